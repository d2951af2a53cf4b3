"""Steps of a model that is thrown away, to find out what a step costs: assembled and taken as training does it.

What a step costs hardly depends on what is learned. So every batch is full, whatever ramp the schedule has, and the
rate is so low that the model stays near its start, where nothing diverges.
"""

from dataclasses import replace
from functools import partial
from typing import Protocol, Self

import torch

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.train.architecture import DEEPSEEK_V3, Architecture
from benthic.train.compute import refuse_without_device, refuse_without_tiles
from benthic.train.schedule import StepSettings
from benthic.train.state import TrainState
from benthic.train.step import accumulate_gradients, train_step

_WARM_UP_STEPS = 2
_RATE_FACTOR = 1e-4
_ANY_DECAY = 0.999
"""An average costs the same whatever its decay, which ``train.ema_span`` leaves open until the steps are known."""


class Sequences(Protocol):
    """Where batches come from."""

    def at(self, index: int, count: int) -> Batch:
        """Sequences ``index`` to ``index + count``."""


class RandomSequences:
    """Random tokens, the same from every object of these settings: they load all experts alike."""

    def __init__(self, config: RunConfig) -> None:
        self._vocab_size, self._seed = config.model.vocab_size, config.train.seed
        self._length = config.train.sequence_length + 1 + config.model.num_nextn_predict_layers

    def at(self, index: int, count: int) -> Batch:
        """So many sequences, which depend on ``index``."""
        generator = torch.Generator().manual_seed(self._seed + index)
        return Batch(torch.randint(self._vocab_size, (count, self._length), generator=generator), None)


class Trial:
    """A model with all that a step changes, and the batches it takes one after another."""

    def __init__(
        self,
        config: RunConfig,
        batches: Sequences,
        compute: Compute,
        architecture: Architecture = DEEPSEEK_V3,
        world: World = ALONE,
    ) -> None:
        refuse_without_tiles(compute)
        train = config.train
        refuse_without_device(train.device, compute)
        if train.ema_span is not None:
            train = train.model_copy(update={"ema_decay": _ANY_DECAY, "ema_span": None})
        precision = config.precision.model_copy(update={"compute": compute})
        self._batches, self._compute = batches, compute
        self._world, self._micro_batch_size = world, train.micro_batch_size or train.batch_size
        config = config.model_copy(update={"train": train, "precision": precision})
        self.state = TrainState(config, architecture, world=world)
        self._settings = StepSettings(
            first_sequence=0,
            batch_size=train.batch_size,
            learning_rate_factor=_RATE_FACTOR,
            bias_speed=train.schedule.bias_update_speed,
            mtp_weight=heaviest_mtp(config),
            balance_weight=train.schedule.balance_loss_weight,
        )

    def warm_up(self) -> Self:
        """Take some steps: the first ones also allocate, compile and fill caches."""
        for _ in range(_WARM_UP_STEPS):
            self.step()
        return self

    def step(self, mtp_weight: float | None = None) -> None:
        """Learn from the next batch, with this weight of the MTP loss or the run's greatest."""
        state, settings = self.state, self._settings
        if mtp_weight is not None:
            settings = replace(settings, mtp_weight=mtp_weight)
        rows = self._world.rows(settings.batch_size, self._micro_batch_size)
        train_step(
            state.objective,
            state.optimizer,
            self._batches.at(state.step * settings.batch_size, settings.batch_size).rows(slice(rows.start, rows.stop)),
            settings,
            micro_batch_size=self._micro_batch_size,
            compute=self._compute,
            gradients=partial(accumulate_gradients, world=self._world),
            world=self._world,
        )
        if state.average is not None:
            state.average.update()
        state.step += 1


def heaviest_mtp(config: RunConfig) -> float:
    """The greatest weight that the MTP loss has in a run; 0 if its modules never run."""
    schedule = config.train.schedule
    early = schedule.mtp_loss_weight if schedule.mtp_late_start else 0.0
    late = schedule.mtp_late_loss_weight if schedule.mtp_late_start < 1 else 0.0
    return max(early, late) if config.model.num_nextn_predict_layers else 0.0
