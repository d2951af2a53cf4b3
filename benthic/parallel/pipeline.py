"""Runs micro-batches through the stages of a model that lie on several ranks, by torch.distributed.pipelining.

Its runtime takes any schedule as a list of actions. What it is spared here is finding out shapes by a trial run and
cutting batches into micro-batches: both are known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import P2POp, ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.distributed.pipelining.schedules import _add_send_recv, _PipelineScheduleRuntime

from benthic.model import LanguageModel
from benthic.parallel.cut import Costs, computed_costs, cut, cut_in_v, stages_of
from benthic.parallel.local import local
from benthic.parallel.schedules import Orders, forward_orders, orders
from benthic.parallel.stage_ranks import KINDS, Schedule, ranks_of_stages, stages_of_rank
from benthic.parallel.stages import EMBEDDING, PIPELINE, AnyStage, MicroBatch, drop_other_stages, make_stages

Call = Callable[[nn.Module, Tensor | None, MicroBatch], Tensor]
"""Runs a stage in some precision."""


class Pipeline:
    """The stages that this rank holds, of a model whose other stages the other ranks of ``group`` hold.

    Args:
        copying_rank: has a copy of the first rank's embedding; 0 if none has.
    """

    def __init__(
        self, stages: Mapping[int, AnyStage], schedule: Schedule, group: ProcessGroup, copying_rank: int = 0
    ) -> None:
        self._schedule, self._group, self._copying_rank = schedule, group, copying_rank
        self._parts = {number: _Part(stage) for number, stage in stages.items()}
        self._runners: dict[tuple[int, bool], _Runner] = {}

    def backward(self, micro_batches: Sequence[MicroBatch], call: Call, dtype: torch.dtype) -> None:
        """Adds the gradients of the micro-batches' losses to those of this rank's parameters.

        Every rank gives the same micro-batches; ``call`` runs a stage, whose states are of this dtype.
        """
        self._run(micro_batches, call, dtype, learn=True)

    def add_up_copies(self, embedding: nn.Module) -> None:
        """Sums the embedding's gradient with that of its copy, on both ranks that have one.

        Called on all ranks once the gradients are there; a copy has none in a step without MTP.
        """
        rank, last = self._group.rank(), self._copying_rank
        if not last or rank not in (0, last):
            return
        weight = embedding.get_parameter("weight")
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grad = local(weight.grad)
        if rank:
            dist.send(grad, group=self._group, group_dst=0)
            dist.recv(grad, group=self._group, group_src=0)
        else:
            other = torch.empty_like(grad)
            dist.recv(other, group=self._group, group_src=last)
            grad += other
            dist.send(grad, group=self._group, group_dst=last)

    def total(self, numbers: Tensor) -> Tensor:
        """Their sum over all stages."""
        total = numbers.clone()
        dist.all_reduce(total, group=self._group)
        return total

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], call: Call, dtype: torch.dtype) -> None:
        """Shows the micro-batches to all stages, without gradients."""
        self._run(micro_batches, call, dtype, learn=False)

    def _run(self, micro_batches: Sequence[MicroBatch], call: Call, dtype: torch.dtype, *, learn: bool) -> None:
        for part in self._parts.values():
            part.call = call
        key = len(micro_batches), learn
        if key not in self._runners:
            self._runners[key] = self._runner(*key)
        self._runners[key].run(micro_batches, dtype)

    def _runner(self, micro_batches: int, learn: bool) -> "_Runner":
        ranks = self._group.size()
        ranks_of = ranks_of_stages(self._schedule, ranks)
        stages = [_TorchStage(part, number, len(ranks_of), self._group) for number, part in self._parts.items()]
        make = orders if learn else forward_orders
        return _Runner(stages, micro_batches, make(self._schedule, ranks, micro_batches), ranks_of, learn=learn)


def divide_layers(
    objective: nn.Module,
    schedule: Schedule,
    group: ProcessGroup,
    *,
    length: int,
    counts: Sequence[int] | None = None,
) -> None:
    """Keep this rank's stages of the model in an objective, and let its steps go through the pipeline.

    Args:
        length: of the sequences, by which the cost of attention is told.
        counts: layers of each stage; by default as that cost has it.

    Raises:
        InputError: the model has too few layers.
    """
    model = next(part for part in objective.modules() if isinstance(part, LanguageModel))
    costs = computed_costs(model.config, length, mtp=len(model.mtp) > 0)
    layers = layers_of_stages(costs, schedule, group.size(), counts)
    held = make_stages(model, layers, stages_of_rank(schedule, group.size(), group.rank()))
    drop_other_stages(model, held)
    copying_rank = ranks_of_stages(schedule, group.size())[-1] if len(model.mtp) else 0
    model.__dict__[PIPELINE] = Pipeline(held, schedule, group, copying_rank)
    if copying_rank == group.rank() != 0:
        model.copies = frozenset([EMBEDDING])


def layers_of_stages(costs: Costs, schedule: Schedule, ranks: int, counts: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage of a pipeline of so many ranks: so many as ``counts`` says, or by what they cost.

    Raises InputError if there are too few.
    """
    if counts is not None:
        return stages_of(counts)
    kind = KINDS[schedule]
    return (cut_in_v if kind.v_shaped else cut)(costs, ranks * kind.stages_per_rank)


class _Part(nn.Module):
    """A stage as torch's runtime calls it."""

    call: Call

    def __init__(self, stage: AnyStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor | None = None, *, micro_batch: "_Opaque") -> Tensor:
        return self.call(self.stage, x, micro_batch.held)


class _Opaque:
    """Hides a micro-batch's tensors from torch's runtime, which would look for their gradients."""

    def __init__(self, held: MicroBatch) -> None:
        self.held = held


class _TorchStage(PipelineStage):
    """A stage whose micro-batches may differ in size, and whose memory for what arrives is held no longer than needed.

    Torch's own holds it for all micro-batches from the first step to the last.
    """

    sizes: list[tuple[int, ...]]
    """Of what arrives, by micro-batch."""
    dtype: torch.dtype

    def __init__(self, part: _Part, number: int, stages: int, group: ProcessGroup) -> None:
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


class _Runner(_PipelineScheduleRuntime):
    """Torch's runtime over one schedule for so many micro-batches."""

    def __init__(
        self, stages: list[_TorchStage], micro_batches: int, orders: Orders, ranks_of: list[int], *, learn: bool
    ) -> None:
        super().__init__(stages, micro_batches, loss_fn=_itself if learn else None, scale_grads=False)
        self._torch_stages = stages
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
        for stage in self._torch_stages:
            stage.has_backward = self._has_backward
            stage.sizes = [stage.part.stage.size(micro_batch) for micro_batch in micro_batches]
            stage.dtype = dtype
            stage.clear_runtime_states()
        held = [{"micro_batch": _Opaque(micro_batch)} for micro_batch in micro_batches]
        nothing: list[Any] = [()] * len(held)
        self._step_microbatches(nothing, held, nothing, return_outputs=False)


def _itself(loss: Tensor, _: Any) -> Tensor:
    return loss
