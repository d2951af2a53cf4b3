"""How fast training goes, and whether the minutes it was given are put to use.

Steps are planned by a few that are timed beforehand. Where something else kept the machine busy just then, too few
are planned; so as long as nothing has been saved, a run that turns out to be much faster begins again.
"""

import time
from collections import deque

from benthic.train.work import Spent

RECENT = 20
"""Steps by whose pace the rest is told: those in which MTP modules learn take longer."""
_WORTH_IT = 1.5
"""Times the steps that were planned, at which a run begins again."""
_PLANS = 4
"""At most: where steps go fast whenever they are not timed, no plan is better than the one before."""


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
    """There is time for many more steps than were planned; no error, it leads back to where they are."""


class TimeGiven:
    """The minutes that a run was given, if it was, and how many of them are left; they begin with this object.

    ``plans`` is how many times steps were planned for them.
    """

    def __init__(self, minutes: float | None) -> None:
        self._minutes, self._start = minutes, time.monotonic()
        self.plans = 0

    def minutes_left(self) -> float | None:
        """None where no time was given."""
        return None if self._minutes is None else self._minutes - (time.monotonic() - self._start) / 60

    def is_wasted(self, seconds: float) -> bool:
        """Whether a run that takes so long as a whole could be begun again, half as long again."""
        left = self.minutes_left()
        return left is not None and 60 * left >= _WORTH_IT * seconds and self.plans < _PLANS
