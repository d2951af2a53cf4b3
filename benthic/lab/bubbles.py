"""How idle pipeline schedules leave their ranks: measured on stages that do nothing but wait, in real processes."""

import multiprocessing
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import start_processes

from benthic.ops.wanted import wanted
from benthic.parallel.pipeline import Pipeline
from benthic.parallel.schedules import orders
from benthic.parallel.stage_ranks import KINDS, Schedule, ranks_of_stages, stages_of_rank
from benthic.parallel.stages import AnyStage, MicroBatch
from benthic.parallel.timeline import Times, idle_share, idle_share_between, published_idle_share, simulate

_TIMEOUT = timedelta(seconds=120)


class Idle(NamedTuple):
    """Shares of the ranks' time in which they run nothing."""

    measured: float
    simulated: float
    published: float | None


def measure_idle(schedule: Schedule, stages: int, micro_batches: int, times: Times) -> Idle:
    """Over one step of gloo processes on this machine; ``times`` are in seconds."""
    ranks = stages // KINDS[schedule].stages_per_rank
    expected = simulate(orders(schedule, ranks, micro_batches), stages, times)
    measured = _run(schedule, ranks, micro_batches, times)
    published = published_idle_share(schedule, stages, ranks, micro_batches, times)
    return Idle(idle_share_between(measured), idle_share(expected), published)


def _run(schedule: Schedule, ranks: int, micro_batches: int, times: Times) -> list[list[tuple[float, float]]]:
    """When each rank was busy."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # imports take seconds
    arguments = store.port, schedule, ranks, micro_batches, times
    start_processes(_run_on_rank, arguments, nprocs=ranks, start_method="forkserver")
    spans = [map(float, store.get(f"spans {rank}").decode().split()) for rank in range(ranks)]
    return [list(zip(numbers, numbers, strict=True)) for numbers in spans]


def _run_on_rank(rank: int, port: int, schedule: Schedule, ranks: int, micro_batches: int, times: Times) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
    try:
        assert dist.group.WORLD is not None
        last = len(ranks_of_stages(schedule, ranks)) - 1
        spans: list[float] = []
        stages = {
            stage: _Waiting(times, last=stage == last, spans=spans) for stage in stages_of_rank(schedule, ranks, rank)
        }
        pipeline = Pipeline(stages, schedule, dist.group.WORLD)
        nothing: list[Any] = [None] * micro_batches
        pipeline.forward(nothing, _call, torch.float32)  # connects the processes
        for number in ("first", "measured"):
            dist.barrier()
            spans.clear()
            for stage in stages.values():
                stage.times = times if number == "measured" else Times(0.0, 0.0, 0.0)
            pipeline.backward(nothing, _call, torch.float32)
        store.set(f"spans {rank}", " ".join(map(str, spans)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _call(stage: nn.Module, x: Tensor | None, micro_batch: MicroBatch) -> Tensor:
    out: Tensor = stage(x, micro_batch)
    return out


class _Waiting(AnyStage):
    """Takes its time over each pass, and notes when."""

    def __init__(self, times: Times, *, last: bool, spans: list[float]) -> None:
        super().__init__()
        self.times, self._last, self._spans = times, last, spans
        self.weight = nn.Parameter(torch.ones(()))

    def size(self, micro_batch: MicroBatch) -> tuple[int, ...]:
        return (1,)

    def forward(self, x_BTD: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        self.wait(self.times.forward)
        out: Tensor = _Wait.apply(torch.zeros(1) if x_BTD is None else x_BTD, self.weight, self)
        return out.sum() if self._last else out

    def wait(self, seconds: float) -> None:
        start = time.monotonic()
        time.sleep(seconds)
        self._spans += [start, time.monotonic()]


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stage: _Waiting) -> Tensor:
        ctx.stage, ctx.is_first = stage, not x.requires_grad
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight = wanted(ctx)
        times = ctx.stage.times
        # The first stage's input has no gradient; what its layers take for theirs is waited for with the weights.
        ctx.stage.wait(times.backward_input * (of_x or ctx.is_first) + times.backward_weight * of_weight)
        return grads[0] if of_x else None, torch.zeros(()) if of_weight else None, None
