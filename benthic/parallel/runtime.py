"""Torch's pipelining runtime as Benthic's stages and schedules need it.

It takes any schedule as a list of actions. What it is spared here is finding out shapes by a trial run and cutting
batches into micro-batches: both are known. A forward and a backward pass that a schedule pairs run in turns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import P2POp, ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.distributed.pipelining.schedules import (
    _add_send_recv,
    _PipelineContext,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)

from benthic.parallel.schedules import Action, Computation, Orders, parts
from benthic.parallel.shard import one_end
from benthic.parallel.stages import AnyStage, MicroBatch
from benthic.parallel.turns import Turns

Call = Callable[[nn.Module, Tensor | None, MicroBatch], Tensor]
"""Runs a stage in some precision."""


class Part(nn.Module):
    """A stage as torch's runtime calls it."""

    call: Call

    def __init__(self, stage: AnyStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor | None = None, *, micro_batch: "_Opaque") -> Tensor:
        """In the precision of ``call``."""
        return self.call(self.stage, x, micro_batch.held)


class _Opaque:
    """Hides a micro-batch's tensors from torch's runtime, which would look for their gradients."""

    def __init__(self, held: MicroBatch) -> None:
        self.held = held


class TorchStage(PipelineStage):
    """A stage whose micro-batches may differ in size, and whose memory for what arrives is held no longer than needed.

    Torch's own holds it for all micro-batches from the first step to the last.
    """

    sizes: list[tuple[int, ...]]
    """Of what arrives, by micro-batch."""
    dtype: torch.dtype

    def __init__(self, part: Part, number: int, stages: int, group: ProcessGroup) -> None:
        # Sizes are given for each step; of these, only that they have gradients counts.
        some = torch.empty(1, device="meta", requires_grad=True)
        device = next(part.parameters()).device
        super().__init__(part, number, stages, device, some, some, group=group)
        self.part = part

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """With memory for the states that arrive."""
        self._allocate(self.args_recv_info, fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """With memory for the gradients that arrive."""
        self._allocate(self.grad_recv_info, bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Lets go of what has arrived, which autograd keeps as long as needed."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._release(self.args_recv_info, fwd_chunk_id)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Lets go of what has arrived."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._release(self.grad_recv_info, bwd_chunk_id)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[Any, Any]:
        """Keeps the graph until all gradients of weights are there.

        Those of the embedding, used by one MTP module and the next, are found by way of what lies between, which
        torch would have thrown away before other weights there had theirs.
        """
        if backward_type == "weight":
            return stage_backward_weight(self.submod.parameters(), bwd_kwargs["param_groups"], retain_graph=True), None
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def _allocate(self, infos: dict[int, Any], chunk: int) -> None:
        for info in infos[chunk]:
            if not info.is_root_arg:
                info.buffer = torch.empty(self.sizes[chunk], dtype=self.dtype, device=self.device)

    def _release(self, infos: dict[int, Any], chunk: int) -> None:
        for info in infos.get(chunk, ()):
            info.buffer = None


class Runner(_PipelineScheduleRuntime):
    """Torch's runtime over one schedule for so many micro-batches."""

    def __init__(
        self,
        stages: list[TorchStage],
        micro_batches: int,
        orders: Orders,
        ranks_of: list[int],
        turns: Turns | None,
        *,
        learn: bool,
    ) -> None:
        super().__init__(stages, micro_batches, loss_fn=_itself if learn else None, scale_grads=False)
        self._stage = {stage.stage_index: stage for stage in stages}
        if turns is not None:
            self.register_custom_function(Computation.OVERLAP_F_B, partial(self._pair, turns))
        if learn:
            self._prepare_schedule_with_comms({rank: list(actions) for rank, actions in orders.items()})
        else:
            self._prepare_forward(orders, ranks_of)

    def _prepare_forward(self, orders: Orders, ranks_of: list[int]) -> None:
        """As torch prepares a schedule, which must have backward passes for that."""
        self.stage_index_to_group_rank = dict(enumerate(ranks_of))
        for stage in self._stages:
            stage.stage_index_to_group_rank = self.stage_index_to_group_rank
        self.pipeline_order_with_comms = _add_send_recv(orders, ranks_of.__getitem__, len(ranks_of))

    def run(self, micro_batches: Sequence[MicroBatch], dtype: torch.dtype) -> None:
        """One step; as torch's ``step``, for batches that are cut already."""
        for stage in self._stage.values():
            stage.has_backward = self._has_backward
            stage.sizes = [stage.part.stage.size(micro_batch) for micro_batch in micro_batches]
            stage.dtype = dtype
            stage.clear_runtime_states()
        held = [{"micro_batch": _Opaque(micro_batch)} for micro_batch in micro_batches]
        nothing: list[Any] = [()] * len(held)
        self._step_microbatches(nothing, held, nothing, return_outputs=False)

    # Torch runs the passes of a pair one after the other, by a function within another, which cannot be called. So what
    # it does for each is here once more.
    def _pair(self, turns: Turns, action: Action, ctx: _PipelineContext) -> None:
        """A forward pass through one stage and a backward pass through another, in turns."""
        forward, backward = parts(action)
        with one_end(part for stage in self._stage.values() for part in stage.part.modules()):
            turns.run(partial(self._forward, forward, ctx), partial(self._backward, backward))

    def _forward(self, action: Action, context: _PipelineContext) -> None:
        number, chunk = _place(action)
        stage, following = self._stage[number], self._stage.get(number + 1)
        assert context.kwarg_mbs is not None
        if not stage.is_first and number - 1 not in self._stage:
            _wait_batch_p2p(self.fwd_recv_ops.pop((number, chunk)))
        output = stage.forward_one_chunk(chunk, (), context.kwarg_mbs[chunk], save_forward_output=False)
        self._maybe_compute_loss(stage, output, context.target_mbs, chunk)
        if following is not None:
            following.set_local_fwd_input(output, chunk)

    def _backward(self, action: Action) -> None:
        number, chunk = _place(action)
        stage, preceding = self._stage[number], self._stage.get(number - 1)
        if not stage.is_last and number + 1 not in self._stage:
            _wait_batch_p2p(self.bwd_recv_ops.pop((number, chunk)))
        self.backward_counter[number] += 1
        last = self.backward_counter[number] == self._n_microbatches
        stage.backward_one_chunk(chunk, loss=self._maybe_get_loss(stage, chunk), last_backward=last)
        if preceding is not None:
            preceding.set_local_bwd_input(stage.get_local_bwd_output(chunk), chunk)


def _place(action: Action) -> tuple[int, int]:
    """Stage and micro-batch."""
    assert action.microbatch_index is not None
    return action.stage_index, action.microbatch_index


def _itself(loss: Tensor, _: Any) -> Tensor:
    return loss
