"""Settings left to this machine: the precision that is fastest here, and how many steps fit into the minutes given.

Measured on a model that is thrown away, so that nothing of it is left in the run. The answers go into the resolved
settings, so a resumed run does not measure again.
"""

import math
import statistics
import time

import torch

from benthic.config.schema import RunConfig, ScheduleConfig, TrainConfig
from benthic.config.stages import stages
from benthic.precision.compute import Compute
from benthic.train.architecture import DEEPSEEK_V3, Architecture
from benthic.train.optimizer import matrix_products
from benthic.train.probe import PROBED_TOKENS
from benthic.train.schedule import steps_per_full_batch
from benthic.train.trial import RandomSequences, Sequences, Trial

_MODES: tuple[Compute, ...] = ("fp32", "bf16")
_FEWEST_STEPS = 5
_SHARE_OF_RUN = 0.01
"""Of the minutes given, spent on measuring how long a step takes."""
_FORWARD_SHARE = 1 / 3
"""Of a training step's operations: what a validation token costs beside a training token."""


def resolve(
    config: RunConfig,
    batches: Sequences | None = None,
    architecture: Architecture = DEEPSEEK_V3,
    held_out_tokens: int | None = None,
) -> RunConfig:
    """The settings with the precisions and ``train.steps`` decided and ``train.minutes`` gone.

    Both are measured on steps of the first stage, whose sequences ``batches`` are; by default, random ones. Where a run
    begins with another's weights, nothing of pretraining is decided. ``held_out_tokens`` are all that validations read.
    """
    first = next(stage for stage in stages(config) if stage.kind != "base").config
    batches = batches or RandomSequences(first)
    asked = config.precision.compute
    compute = _fastest(first, batches, architecture) if asked == "auto" else asked
    precision = config.precision.model_copy(update={"compute": compute})
    train = config.train
    pretrained_here = config.posttrain.base is None
    if train.minutes is not None and pretrained_here:
        budget = 60 * train.minutes
        full_step = seconds_per_step(first, batches, compute, budget * _SHARE_OF_RUN, architecture)
        steps = affordable_steps(first, full_step, budget, held_out_tokens)
        train = train.model_copy(update={"steps": steps, "minutes": None})
    if train.ema_span is not None and train.steps is not None:
        train = train.model_copy(update={"ema_decay": ema_decay(train.ema_span, train.steps), "ema_span": None})
    if train.optimizer.name == "muon":
        # Of the run, not of the machine: it must not change where the run is resumed.
        products = {"matrix_products": matrix_products(train.optimizer, torch.device(train.device))}
        train = train.model_copy(update={"optimizer": train.optimizer.model_copy(update=products)})
    return config.model_copy(update={"precision": precision, "train": train})


def ema_decay(span: float, steps: int) -> float:
    """Decay of an average whose share of a weight falls to 1/e within this fraction of the steps."""
    return math.exp(-1 / (span * steps))


def _fastest(config: RunConfig, batches: Sequences, architecture: Architecture) -> Compute:
    seconds = {mode: seconds_per_step(config, batches, mode, architecture=architecture) for mode in _MODES}
    return min(seconds, key=seconds.__getitem__)


def affordable_steps(
    config: RunConfig, seconds: float, budget: float, held_out_tokens: int | None = None
) -> int:  # fmt: skip
    """Steps that fit into ``budget`` seconds when one of a full batch takes ``seconds``.

    Validations during the run are counted in; the last one, of the whole split, comes on top.
    """
    train = config.train
    validation = seconds * _FORWARD_SHARE * _validated(train, held_out_tokens) / _tokens_of_step(train)
    full_batches = budget / (seconds + validation / train.validate_every)
    return max(1, round(full_batches * steps_per_full_batch(train.schedule)))


def _validated(train: TrainConfig, held_out_tokens: int | None) -> int:
    """Tokens that a validation during the run reads: for the loss, once more with averaged weights, for the probe."""
    averaged = bool(train.ema_decay or train.ema_span)
    there = math.inf if held_out_tokens is None else held_out_tokens
    return int(min(train.validation_tokens, there) * (2 if averaged else 1) + min(PROBED_TOKENS, there))


def _tokens_of_step(train: TrainConfig) -> int:
    return train.batch_size * train.sequence_length


def seconds_per_step(
    config: RunConfig,
    batches: Sequences,
    compute: Compute,
    budget: float = 0.0,
    architecture: Architecture = DEEPSEEK_V3,
) -> float:
    """Time of a full-batch step, after warming up, over ``budget`` seconds but a few steps at least.

    Where the steps of a run's parts differ, each part counts by its share of the run.
    """
    trial = Trial(config, batches, compute, architecture).warm_up()
    return sum(
        share * _median_seconds(trial, mtp_weight, budget * share)
        for mtp_weight, share in parts_of_run(config.train.schedule)
    )


def parts_of_run(schedule: ScheduleConfig) -> list[tuple[float, float]]:
    """Weights of the MTP loss, at 0 of which a step is cheaper, each with its share of the run."""
    early, late, start = schedule.mtp_loss_weight, schedule.mtp_late_loss_weight, schedule.mtp_late_start
    share = sum(part for weight, part in ((early, start), (late, 1 - start)) if weight) / schedule.mtp_every
    return [(weight, part) for weight, part in ((0.0, 1 - share), (early or late, share)) if part > 1e-9]


def _median_seconds(trial: Trial, mtp_weight: float, budget: float) -> float:
    seconds: list[float] = []
    while len(seconds) < _FEWEST_STEPS or sum(seconds) < budget:
        start = time.perf_counter()
        trial.step(mtp_weight)
        seconds.append(time.perf_counter() - start)
    # What else runs on the machine disturbs some steps; a mean would promise too few.
    return statistics.median(seconds)
