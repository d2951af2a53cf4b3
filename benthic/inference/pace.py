"""How far ahead to draft: as far as the tokens a draft may save are worth the time it costs.

A step that decodes r rows takes about a + b * r seconds, and a drafted row c more; both are measured as the engine
runs. A draft is worth making if it raises the tokens a step yields per second. Where decoding is bound by reading
weights, b is small and drafts pay; where it is bound by arithmetic, as in large batches, they do not, and drafting
stops by itself. Now and then the other way is tried, so that the figures stay true.
"""

from collections.abc import Sequence

_MEMORY = 0.97
"""What a measurement still counts after the next one."""
_HOPE = 0.7
"""Acceptance assumed before anything is known."""
_LEARNING = 0.1
_TRY_EVERY, _TRY_SELDOM = 32, 512
"""Steps until the other way is tried: as long as it may pay, and at most."""
_TRIAL_STEPS = 8
"""Steps that drafts are tried for, while they do not pay."""
_GIVE_UP = 4
"""So many failed trials in a row make most new requests do without drafts altogether."""
_TRIAL_REQUESTS = 8
"""Then one of so many still tries."""


class Line:
    """Seconds as a linear function of rows, fitted to recent measurements."""

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._y = self._xy = 0.0

    def add(self, rows: float, seconds: float) -> None:
        """A measurement; one slow moment counts as no more than four times what was expected.

        One four times as fast means that what was expected came of slow moments, such as an engine's first: it is
        forgotten.
        """
        if self._n:
            intercept, slope = self.fit()
            fitted, mean = intercept + slope * rows, self._y / self._n
            expected = max(fitted, mean)
            if 4 * seconds < min(fitted, mean):
                self._n = self._x = self._xx = self._y = self._xy = 0.0
            seconds = min(seconds, 4 * expected)
        self._n = _MEMORY * self._n + 1
        self._x = _MEMORY * self._x + rows
        self._xx = _MEMORY * self._xx + rows * rows
        self._y = _MEMORY * self._y + seconds
        self._xy = _MEMORY * self._xy + rows * seconds

    def fit(self) -> tuple[float, float]:
        """Intercept and slope, neither below 0; the slope is 0 while only one number of rows has been seen."""
        if not self._n:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        if variance < 1e-6 * mean_x**2:
            return mean_y, 0.0
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / variance)
        if slope * mean_x > mean_y:
            return 0.0, mean_y / mean_x
        return mean_y - slope * mean_x, slope


class Acceptance:
    """How often a draft at each depth is right, given that those before it were."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = list(rates)

    def learn(self, drafted: int, accepted: int) -> None:
        """Of so many drafts in a row, the first so many were right."""
        for depth in range(min(accepted + 1, drafted)):
            self.rates[depth] += _LEARNING * ((depth < accepted) - self.rates[depth])


class Pace:
    """Chooses how many tokens to draft for each sequence of a step."""

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self.overall = Acceptance([_HOPE] * max_depth)
        self.decoding, self.drafting = Line(), Line()
        self._steps_to_trial = _TRY_EVERY
        self._interval = _TRY_EVERY
        self._failed_trials = self._requests = 0

    def new_request(self) -> Acceptance | None:
        """What to expect of a new request; None if it had better do without drafts."""
        self._requests += 1
        if not self.max_depth or (self.given_up and self._requests % _TRIAL_REQUESTS):
            return None
        return Acceptance(self.overall.rates)

    @property
    def given_up(self) -> bool:
        """Whether so many trials were in vain that most new requests do without drafts."""
        return self._failed_trials >= _GIVE_UP

    def learn(self, request: Acceptance, drafted: int, accepted: int) -> None:
        """Drafts of a request have been verified."""
        request.learn(drafted, accepted)
        self.overall.learn(drafted, accepted)

    def depths(self, requests: Sequence[tuple[Acceptance | None, int]], rows: int) -> list[int]:
        """Drafts for each of the requests in a step.

        Args:
            requests: acceptance so far (None: no drafts), and the most drafts that are of use.
            rows: rows of the step without drafts.
        """
        best = self._best(requests, rows)
        if not any(cap for acceptance, cap in requests if acceptance):
            return best
        pays = any(best)
        self._steps_to_trial -= 1
        if self._steps_to_trial > 0:
            return best
        if self._steps_to_trial == 0:
            self._failed_trials = 0 if pays else self._failed_trials + 1
            self._interval = _TRY_EVERY if pays else min(2 * self._interval, _TRY_SELDOM)
        if pays or self._steps_to_trial <= 1 - _TRIAL_STEPS:
            self._steps_to_trial = self._interval
        return [0 if pays or not acceptance else min(1, cap) for acceptance, cap in requests]

    def _best(self, requests: Sequence[tuple[Acceptance | None, int]], rows: int) -> list[int]:
        """Drafts in order of their chance, as long as each raises the tokens per second."""
        fixed, per_row = self.decoding.fit()
        draft_fixed, draft_per_row = self.drafting.fit()
        # One pass of an MTP module drafts for all requests.
        cost = per_row + draft_per_row + draft_fixed / max(1, len(requests))
        tokens, seconds = float(len(requests)), fixed + per_row * rows
        depths = [0] * len(requests)
        for chance, index in sorted(_chances(requests), reverse=True):
            if (tokens + chance) * seconds < tokens * (seconds + cost):
                break
            tokens, seconds = tokens + chance, seconds + cost
            depths[index] += 1
        return depths


def _chances(requests: Sequence[tuple[Acceptance | None, int]]) -> list[tuple[float, int]]:
    """For each possible draft, the chance that it is accepted and the index of its request."""
    chances = []
    for index, (acceptance, cap) in enumerate(requests):
        chance = 1.0
        for rate in acceptance.rates[:cap] if acceptance else ():
            chance *= rate
            chances.append((chance, index))
    return chances
