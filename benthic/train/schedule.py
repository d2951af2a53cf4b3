"""The course of a run: how much each step reads and with which settings, as pure functions of its position.

Every moment is a fraction of the run, so that one recipe serves three million tokens and fourteen trillion alike,
and a resumed run needs nothing but its step. Published values: DeepSeek-V3 report, section 4.2.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

from benthic.config.schema import ScheduleConfig


@dataclass(frozen=True)
class StepSettings:
    """What one optimizer step does: the sequences it reads and the values the schedule gives it."""

    first_sequence: int
    batch_size: int
    learning_rate_factor: float
    """Multiplies each parameter group's peak rate."""
    bias_speed: float
    mtp_weight: float
    balance_weight: float


class Course:
    """A schedule laid out over a given number of steps of a given full batch size.

    Batch sizes are multiples of ``multiple`` (the micro-batch) while the batch ramps up.
    """

    def __init__(self, schedule: ScheduleConfig, steps: int, batch_size: int, multiple: int = 1) -> None:
        self.schedule = schedule
        self.steps = steps
        expected = steps * batch_size / steps_per_full_batch(schedule)
        self._starts = _starts(schedule, steps, batch_size, multiple, expected)
        sizes = [end - start for start, end in pairwise(self._starts)]
        with_mtp = (size if self._mtp_weight(step) else 0 for step, size in enumerate(sizes))
        self._with_mtp = (0, *accumulate(with_mtp))

    @property
    def sequences(self) -> int:
        """Sequences read by the whole run."""
        return self._starts[-1]

    def sequences_before(self, step: int) -> int:
        """Sequences read by the first ``step`` steps."""
        return self._starts[step]

    def sequences_with_mtp(self, step: int) -> int:
        """Of those, how many the MTP modules read too: they do not run where their loss weighs nothing."""
        return self._with_mtp[step]

    def begins_mtp(self, step: int) -> bool:
        """Whether the MTP modules run for the first time in this step, and not in the very first."""
        return step > 0 and self._with_mtp[step] == 0 < self._with_mtp[step + 1]

    def at(self, step: int) -> StepSettings:
        """Settings of a step, counted from 0."""
        start, end = self._starts[step], self._starts[step + 1]
        seen = start / self.sequences
        return StepSettings(
            first_sequence=start,
            batch_size=end - start,
            learning_rate_factor=warmup_factor(self.schedule, (step + 1) / self.steps) * decay(self.schedule, seen),
            bias_speed=self.schedule.bias_update_speed if seen < self.schedule.bias_update_until else 0.0,
            mtp_weight=self._mtp_weight(step),
            balance_weight=self.schedule.balance_loss_weight,
        )

    def _mtp_weight(self, step: int) -> float:
        counts = (step + 1) % self.schedule.mtp_every == 0
        return mtp_weight(self.schedule, self._starts[step] / self.sequences) if counts else 0.0


def warmup_factor(schedule: ScheduleConfig, steps_done: float) -> float:
    """Linear rise to 1 over the first ``warmup`` of the steps: the one moment that is published in steps."""
    return min(1.0, steps_done / schedule.warmup) if schedule.warmup else 1.0


def decay(schedule: ScheduleConfig, seen: float) -> float:
    """The learning rate after warm-up as a share of its peak, once ``seen`` of the tokens are read."""
    if seen >= schedule.tail_start:
        return schedule.tail_factor
    if seen >= schedule.decay_end:
        return schedule.decay_factor
    if seen <= schedule.decay_start:
        return 1.0
    course = (seen - schedule.decay_start) / (schedule.decay_end - schedule.decay_start)
    return schedule.decay_factor + (1 - schedule.decay_factor) * 0.5 * (1 + math.cos(math.pi * course))


def mtp_weight(schedule: ScheduleConfig, seen: float) -> float:
    """Weight of the multi-token-prediction loss, in steps where it counts, once ``seen`` of the tokens are read."""
    return schedule.mtp_loss_weight if seen < schedule.mtp_late_start else schedule.mtp_late_loss_weight


def batch_share(schedule: ScheduleConfig, seen: float) -> float:
    """The batch as a share of its full size once ``seen`` of the tokens are read: linear in tokens."""
    if seen >= schedule.batch_ramp:
        return 1.0
    return schedule.batch_ramp_start + (1 - schedule.batch_ramp_start) * seen / schedule.batch_ramp


def steps_per_full_batch(schedule: ScheduleConfig) -> float:
    """Steps a run takes, over the steps it would take at the full batch size throughout.

    In the ramp the batch b grows with the tokens x read, dx/dn = b(x); so its steps are the integral of 1/b.
    """
    start = schedule.batch_ramp_start
    ramp = math.log(1 / start) / (1 - start) if start < 1 else 1.0
    return 1 + schedule.batch_ramp * (ramp - 1)


def _starts(
    schedule: ScheduleConfig, steps: int, batch_size: int, multiple: int, expected_sequences: float
) -> tuple[int, ...]:
    """First sequence of every step, and the end of the last."""
    if not schedule.batch_ramp:
        return tuple(range(0, (steps + 1) * batch_size, batch_size))
    starts = [0]
    for _ in range(steps):
        share = batch_share(schedule, starts[-1] / expected_sequences)
        starts.append(starts[-1] + max(multiple, round(share * batch_size / multiple) * multiple))
    return tuple(starts)
