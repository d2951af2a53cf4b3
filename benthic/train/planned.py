"""The plan of a run: its model, and what training it takes on so many GPUs of a kind; what ``benthic.plan`` returns.

It stands here, above ``benthic/plan``, for it asks the code that divides a model among ranks (``dry_run.py``).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benthic.config.schema import RunConfig
from benthic.config.stages import stages
from benthic.errors import InputError
from benthic.plan.cost import (
    BUSY_SHARE_OF_PEAK,
    StepTime,
    computing_seconds,
    energy_kwh,
    gpu_hours,
    sending_seconds,
    updating_seconds,
    waiting_seconds,
)
from benthic.plan.flops import training_flops
from benthic.plan.hardware import GPUS, Gpu
from benthic.plan.report import Plan, plan_model
from benthic.train.dry_run import DryRun, StageRanks, dry_run
from benthic.train.schedule import Course
from benthic.train.trial import heaviest_mtp

_DEFAULT = GPUS["H800"]


@dataclass(frozen=True)
class PhasePlan:
    """A stage of pretraining or context extension."""

    name: str
    sequence_length: int
    steps: int
    tokens: int
    step_seconds: float
    step_parts: dict[str, float]
    """Seconds of a step, of a full batch, by what passes them (:class:`benthic.plan.cost.StepTime`)."""
    bubble_share: float
    memory_per_gpu_gib: float
    gpu_hours: float


@dataclass(frozen=True)
class RunPlan(Plan):
    """A model and its training; the fields are the keys of ``benthic plan --json``."""

    gpu: str
    gpus: int
    parallel: dict[str, Any]
    """The layout: as set, or chosen if that is for another number of GPUs."""
    micro_batch_size: int
    memory_per_gpu_gib: float
    """Of the fullest rank, in pretraining; as this code is, with PyTorch's operations."""
    fits: bool
    bubble_share: float
    step_seconds: float
    gpu_hours: float
    """Of pretraining and context extension."""
    cost_usd: float
    energy_kwh: float
    """Of the GPUs at their design power."""
    phases: tuple[PhasePlan, ...]


def plan(config: RunConfig, *, gpus: int | None = None, gpu: Gpu = _DEFAULT) -> RunPlan:
    """What a recipe's model weighs, and what training it takes.

    Args:
        config: settings; ``train.price_per_hour`` is taken for a GPU's price, if it is given.
        gpus: how many; by default as many as ``parallel`` says. For another number a layout is chosen.
        gpu: of which kind.

    Raises:
        InputError: no layout of so many GPUs fits the model and the batch.
    """
    if gpus is not None and gpus != config.parallel.processes:
        config = _laid_out(config, gpus, gpu)
    phases = [stage for stage in stages(config) if stage.kind == "corpus"]
    runs = [dry_run(stage.config, strict=number == 0) for number, stage in enumerate(phases)]
    planned = tuple(_phase(stage.name, stage.config, run, gpu) for stage, run in zip(phases, runs, strict=True))
    hours = sum(phase.gpu_hours for phase in planned)
    price = config.train.price_per_hour
    first = planned[0]
    return RunPlan(
        **asdict(plan_model(config)),
        gpu=gpu.name,
        gpus=config.parallel.processes,
        parallel=config.parallel.model_dump(include={"pipeline", "expert", "shard", "replicate", "zero", "schedule"}),
        micro_batch_size=runs[0].rows,
        memory_per_gpu_gib=first.memory_per_gpu_gib,
        fits=runs[0].fullest.memory.total <= gpu.memory_bytes,
        bubble_share=first.bubble_share,
        step_seconds=first.step_seconds,
        gpu_hours=hours,
        cost_usd=hours * (gpu.usd_per_hour if price is None else price),
        energy_kwh=energy_kwh(hours, gpu),
        phases=planned,
    )


def _phase(name: str, config: RunConfig, run: DryRun, gpu: Gpu) -> PhasePlan:
    train, gpus = config.train, config.parallel.processes
    time = step_time(config, run, gpu)
    if train.steps is None:  # so many minutes
        assert train.minutes is not None
        steps = round(60 * train.minutes / time.total)
        sequences: float = steps * train.batch_size
    else:
        steps = train.steps
        sequences = Course(train.schedule, steps, train.batch_size, train.micro_batch_size or 1).sequences
    return PhasePlan(
        name=name,
        sequence_length=train.sequence_length,
        steps=steps,
        tokens=round(sequences * train.sequence_length),
        step_seconds=time.total,
        step_parts=asdict(time),
        bubble_share=run.bubble_share,
        memory_per_gpu_gib=run.fullest.memory.total / 2**30,
        # A step of a smaller batch, in a ramp, is as much shorter.
        gpu_hours=gpu_hours(time.total * sequences / train.batch_size, gpus),
    )


def step_time(config: RunConfig, run: DryRun, gpu: Gpu, share_of_peak: float = BUSY_SHARE_OF_PEAK) -> StepTime:
    """Seconds of a step of a full batch.

    What stages and experts exchange is hidden behind computing under DualPipeV, as published, as far as that lasts;
    under other schedules nothing is.
    """
    train = config.train
    flops = training_flops(config.model, train.sequence_length, mtp=bool(heaviest_mtp(config)))
    flops *= train.batch_size * train.sequence_length / run.processes
    computing = computing_seconds(flops, gpu, share_of_peak)
    exchanging = max(_exchanging(stage, run, config, gpu) for stage in run.stages)
    if config.parallel.pipeline > 1 and config.parallel.schedule == "dualpipev":
        exchanging = max(0.0, exchanging - computing)
    return StepTime(
        computing=computing,
        waiting=waiting_seconds(computing, run.bubble_share),
        exchanging=exchanging,
        reducing=max(_reducing(stage, config, gpu) for stage in run.stages),
        updating=max(
            updating_seconds(stage.memory.weights + stage.memory.optimizer + stage.memory.average, gpu)
            for stage in run.stages
        ),
    )


def _exchanging(stage: StageRanks, run: DryRun, config: RunConfig, gpu: Gpu) -> float:
    sent = stage.messages
    tokens = sent.dispatch + sent.combine + sent.counts
    afar = tokens * run.visits.messages_afar / run.visits.messages if run.visits and run.visits.messages else 0.0
    if config.parallel.data_ranks >= gpu.per_node:  # the next stage is on another node
        afar += sent.pipeline + sent.embedding
    return sending_seconds(tokens + sent.pipeline + sent.embedding - afar, afar, gpu)


def _reducing(stage: StageRanks, config: RunConfig, gpu: Gpu) -> float:
    """Over the slower links, if any rank that it goes through is on another node."""
    sent = stage.messages.gradients + stage.messages.weights + stage.messages.copies
    one_node = config.parallel.data_ranks <= gpu.per_node
    return sending_seconds(sent if one_node else 0, 0 if one_node else sent, gpu)


def _laid_out(config: RunConfig, gpus: int, gpu: Gpu) -> RunConfig:
    """The layout with the fastest step among those that fit, or else the one that needs least memory."""
    found = []
    for candidate in _layouts(config, gpus):
        try:
            run = dry_run(candidate)
        except InputError as error:
            refusal = error
            continue
        over = max(0, run.fullest.memory.total - gpu.memory_bytes)
        found.append((over, step_time(candidate, run, gpu).total, candidate))
    if not found:
        raise InputError(f"--gpus {gpus}: no layout fits; of the last that was tried: {refusal}")
    return min(found, key=lambda one: one[:2])[2]


def _layouts(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """Pipelines of any length; experts within a node or over the eight nodes that were published, as far as they go."""
    for pipeline in (number for number in range(1, config.model.num_hidden_layers + 1) if gpus % number == 0):
        for expert in sorted({_largest(gpus // pipeline, config.model.n_routed_experts, most) for most in (8, 64)}):
            shard = gpus // (pipeline * expert)
            micro = config.train.micro_batch_size or 1
            passes = config.train.batch_size // (expert * shard * micro)
            sizes = {
                "pipeline": pipeline,
                "expert": expert,
                "shard": shard,
                "replicate": 1,
                "schedule": "dualpipev" if passes >= 2 * pipeline else "1f1b",
            }
            train = config.train.model_copy(update={"micro_batch_size": micro})
            yield config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes), "train": train})


def _largest(first: int, second: int, most: int) -> int:
    """The largest number up to ``most`` that divides both."""
    return max(number for number in range(1, most + 1) if first % number == 0 and second % number == 0)
