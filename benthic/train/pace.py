"""How fast training goes, and whether the minutes it was given are put to use.

Steps are planned by a few that are timed beforehand. Where something else kept the machine busy just then, too few
are planned; so as long as nothing has been saved, a run that turns out to be much faster begins again.
"""

import time
from collections import deque

from benthic.config.schema import RunConfig
from benthic.train.calibrate import affordable_steps
from benthic.train.schedule import steps_per_full_batch
from benthic.train.work import Spent

RECENT = 20
"""Steps by whose pace the rest is told: those in which MTP modules learn take longer."""
_WORTH_IT = 1.5
"""Times the steps that were planned, at which a run begins again."""


class Pace:
    """Of the last steps."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, Spent]] = deque(maxlen=RECENT)

    def add(self, seconds: float, spent: Spent) -> None:
        """Take note of a step."""
        self._recent.append((seconds, spent))

    @property
    def seconds_per_token(self) -> float:
        """On average."""
        return self._seconds / sum(spent.tokens for _, spent in self._recent)

    @property
    def seconds_per_flop(self) -> float:
        """On average."""
        return self._seconds / sum(spent.flops for _, spent in self._recent)

    @property
    def _seconds(self) -> float:
        return sum(seconds for seconds, _ in self._recent)


class PlanAgain(Exception):
    """There is time for many more steps than were planned; no error, it leads back to where a run begins."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps


class TimeGiven:
    """The minutes that a run was given, if it was; they begin with this object."""

    def __init__(self, minutes: float | None, held_out_tokens: int | None = None) -> None:
        self._minutes, self._start, self._held_out_tokens = minutes, time.monotonic(), held_out_tokens

    def steps_worth_beginning_again(self, config: RunConfig, seconds: float) -> int | None:
        """As many as fit into what is left, where those are many more than planned; ``seconds`` is what all of these
        take, validations not counted.
        """
        planned = config.train.steps
        if self._minutes is None or planned is None:
            return None
        left = 60 * self._minutes - (time.monotonic() - self._start)
        full_step = seconds * steps_per_full_batch(config.train.schedule) / planned
        steps = affordable_steps(config, full_step, left, self._held_out_tokens)
        return steps if left > 0 and steps >= _WORTH_IT * planned else None
