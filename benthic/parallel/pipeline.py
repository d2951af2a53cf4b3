"""Runs micro-batches through the stages of a model that lie on several ranks, by torch.distributed.pipelining.

Its runtime takes any schedule as a list of actions. What it is spared here is finding out shapes by a trial run and
cutting batches into micro-batches: both are known.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _add_send_recv, _PipelineScheduleRuntime

from benthic.parallel.schedules import Orders, Schedule, forward_orders, orders, ranks_of_stages
from benthic.parallel.stages import MicroBatch, Stage

Call = Callable[[nn.Module, Tensor | None, MicroBatch], Tensor]
"""Runs a stage in some precision."""


class Shape(NamedTuple):
    """What goes from stage to stage for each micro-batch of a step."""

    micro_batches: int
    size: tuple[int, int, int]
    """Sequences, positions, model width."""
    dtype: torch.dtype


class Pipeline:
    """The stages that this rank holds, of a model whose other stages the other ranks of ``group`` hold."""

    def __init__(self, stages: dict[int, Stage], schedule: Schedule, group: ProcessGroup) -> None:
        self._stages, self._schedule, self._group = stages, schedule, group
        self._parts = {number: _Part(stage) for number, stage in stages.items()}
        self._runners: dict[tuple[Shape, bool], _Runner] = {}

    def backward(self, micro_batches: Sequence[MicroBatch], shape: Shape, call: Call) -> None:
        """Adds the gradients of the micro-batches' losses to those of this rank's parameters."""
        self._run(micro_batches, shape, call, learn=True)

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], shape: Shape, call: Call) -> None:
        """Shows the micro-batches to all stages, without gradients."""
        self._run(micro_batches, shape, call, learn=False)

    def _run(self, micro_batches: Sequence[MicroBatch], shape: Shape, call: Call, *, learn: bool) -> None:
        for part in self._parts.values():
            part.call = call
        if (shape, learn) not in self._runners:
            self._runners[shape, learn] = self._runner(shape, learn=learn)
        self._runners[shape, learn].run(micro_batches)

    def _runner(self, shape: Shape, *, learn: bool) -> "_Runner":
        ranks = self._group.size()
        ranks_of = ranks_of_stages(self._schedule, ranks)
        between = torch.empty(shape.size, dtype=shape.dtype, device="meta", requires_grad=learn)
        scalar = torch.empty((), device="meta")
        stages = []
        for number, part in self._parts.items():
            device = next(part.parameters()).device
            inputs = torch.empty((), device="meta") if number == 0 else between
            outputs = scalar if number == len(ranks_of) - 1 else between
            stages.append(
                PipelineStage(part, number, len(ranks_of), device, inputs, outputs, group=self._group)
            )
        make = orders if learn else forward_orders
        return _Runner(stages, shape.micro_batches, make(self._schedule, ranks, shape.micro_batches), ranks_of, learn)


class _Part(nn.Module):
    """A stage as torch's runtime calls it."""

    call: Call

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor | None = None, *, micro_batch: "_Opaque") -> Tensor:
        return self.call(self.stage, x, micro_batch.held)


class _Opaque:
    """Hides a micro-batch's tensors from torch's runtime, which would look for their gradients."""

    def __init__(self, held: MicroBatch) -> None:
        self.held = held


class _Runner(_PipelineScheduleRuntime):
    """Torch's runtime over one schedule for so many micro-batches."""

    def __init__(
        self, stages: list[PipelineStage], micro_batches: int, orders: Orders, ranks_of: list[int], learn: bool
    ) -> None:
        super().__init__(stages, micro_batches, loss_fn=_itself if learn else None, scale_grads=False)
        if learn:
            self._prepare_schedule_with_comms(orders)
        else:
            self._prepare_forward(orders, ranks_of)

    def _prepare_forward(self, orders: Orders, ranks_of: list[int]) -> None:
        """As torch prepares a schedule, which must have backward passes for that."""
        self.stage_index_to_group_rank = dict(enumerate(ranks_of))
        for stage in self._stages:
            stage.stage_index_to_group_rank = self.stage_index_to_group_rank
        self.pipeline_order_with_comms = _add_send_recv(orders, ranks_of.__getitem__, len(ranks_of))

    def run(self, micro_batches: Sequence[MicroBatch]) -> None:
        """One step; as torch's ``step``, for batches that are cut already."""
        for stage in self._stages:
            stage.has_backward = self._has_backward
            stage.clear_runtime_states()
        held = [{"micro_batch": _Opaque(micro_batch)} for micro_batch in micro_batches]
        nothing: list[Any] = [()] * len(held)
        self._step_microbatches(nothing, held, nothing, return_outputs=False)


def _itself(loss: Tensor, _: Any) -> Tensor:
    return loss
