"""Settings left to this machine: the precision that is fastest here, and how many steps fit into the minutes given.

Measured on a model that is thrown away, so that nothing of it is left in the run. The answers go into the resolved
settings, so a resumed run does not measure again.
"""

import statistics
import time

import torch

from benthic.config.schema import RunConfig
from benthic.data.batches import Batches
from benthic.precision.compute import Compute
from benthic.train.optimizer import matrix_products
from benthic.train.schedule import Course, StepSettings, steps_per_full_batch
from benthic.train.state import TrainState
from benthic.train.step import train_step

_MODES: tuple[Compute, ...] = ("fp32", "bf16")
_WARM_UP_STEPS = 2
_FEWEST_STEPS = 5
_SHARE_OF_RUN = 0.01
"""Of the minutes given, spent on measuring how long a step takes."""
_FORWARD_SHARE = 1 / 3
"""Of a training step's operations: what a validation token costs beside a training token."""


def resolve(config: RunConfig, batches: Batches) -> RunConfig:
    """The settings with the precisions and ``train.steps`` decided and ``train.minutes`` gone."""
    asked = config.precision.compute
    compute = _fastest(config, batches) if asked == "auto" else asked
    precision = config.precision.model_copy(update={"compute": compute})
    train = config.train
    if train.minutes is not None:
        budget = 60 * train.minutes
        full_step = seconds_per_step(config, batches, compute, budget * _SHARE_OF_RUN)
        train = train.model_copy(update={"steps": affordable_steps(config, full_step, budget), "minutes": None})
    if train.optimizer.name == "muon":
        # Of the run, not of the machine: it must not change where the run is resumed.
        products = {"matrix_products": matrix_products(train.optimizer, torch.device("cpu"))}
        train = train.model_copy(update={"optimizer": train.optimizer.model_copy(update=products)})
    return config.model_copy(update={"precision": precision, "train": train})


def _fastest(config: RunConfig, batches: Batches) -> Compute:
    seconds = {mode: seconds_per_step(config, batches, mode) for mode in _MODES}
    return min(seconds, key=seconds.__getitem__)


def affordable_steps(config: RunConfig, seconds: float, budget: float) -> int:
    """Steps that fit into ``budget`` seconds when one of a full batch takes ``seconds``.

    Validations during the run are counted in; the last one, of the whole split, comes on top.
    """
    train = config.train
    validation = seconds * _FORWARD_SHARE * train.validation_tokens / (train.batch_size * train.sequence_length)
    full_batches = budget / (seconds + validation / train.validate_every)
    return max(1, round(full_batches * steps_per_full_batch(train.schedule)))


def seconds_per_step(config: RunConfig, batches: Batches, compute: Compute, budget: float = 0.0) -> float:
    """Median time of a full-batch step, after warming up, over ``budget`` seconds but a few steps at least."""
    state = TrainState(config)
    course = Course(config.train.schedule.model_copy(update={"batch_ramp": 0.0}), 10**6, config.train.batch_size)
    for step in range(_WARM_UP_STEPS):
        _step(state, config, batches, course.at(step), compute)
    seconds: list[float] = []
    while len(seconds) < _FEWEST_STEPS or sum(seconds) < budget:
        start = time.perf_counter()
        _step(state, config, batches, course.at(_WARM_UP_STEPS + len(seconds)), compute)
        seconds.append(time.perf_counter() - start)
    # What else runs on the machine disturbs some steps; a mean would promise too few.
    return statistics.median(seconds)


def _step(state: TrainState, config: RunConfig, batches: Batches, settings: StepSettings, compute: Compute) -> None:
    batch = batches.at(settings.first_sequence, settings.batch_size)
    micro = config.train.micro_batch_size or config.train.batch_size
    train_step(state.objective, state.optimizer, batch, settings, micro_batch_size=micro, compute=compute)
