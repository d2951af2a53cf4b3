"""What a measurement gives: a value, and the 95% interval that says how sure one may be of it."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
_Z = 1.959963984540054
"""Standard deviations of a normal distribution on either side of the mean that hold 95% of it."""


@dataclass(frozen=True)
class Score:
    """A task's outcome; its fields are the keys of ``benthic eval --json``."""

    metric: str
    value: float
    n: int
    """Independent pieces the value is an average of: problems, documents, or eight sequences of a running text."""
    ci95: tuple[float, float] | None
    """95% confidence interval over the pieces; none of a single piece that is neither right nor wrong."""
    interval: Literal["bootstrap", "wilson"] | None = None
    """How it was made."""


def bootstrap_ci95(totals_N: NDArray[np.float64], weights_N: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of ``totals.sum() / weights.sum()`` when the N pieces are drawn anew with replacement."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(totals_N), size=len(totals_N)) for _ in range(RESAMPLES))
    ratios = [totals_N[chosen].sum() / weights_N[chosen].sum() for chosen in draws]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def wilson_ci95(mean: float, n: int) -> tuple[float, float]:
    """Score interval of a share (Wilson, JASA 22, 1927); it leaves room for doubt even where all or none were right.

    Of values between 0 and 1 that are not all 0 or 1 it is wider than need be: none vary more than those that are.
    """
    spread = _Z**2 / n
    middle = (mean + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(mean * (1 - mean) / n + spread / (4 * n))
    # The ends are exactly 0 and 1 where all agree; rounding must not put the mean outside.
    return min(max(middle - half, 0.0), mean), max(min(middle + half, 1.0), mean)


def share_score(metric: str, values_N: ArrayLike) -> Score:
    """The mean of N values from 0 to 1, one a problem: by Wilson where they are all 0 or 1, or all the same (which
    leaves a bootstrap nothing to draw from), else by bootstrap over the problems.
    """
    values = np.asarray(values_N, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if bool(np.isin(values, (0.0, 1.0)).all()) or bool((values == values[0]).all()):
        return Score(metric, mean, n, wilson_ci95(mean, n), "wilson")
    return Score(metric, mean, n, bootstrap_ci95(values, np.ones(n)), "bootstrap")


def ratio_score(metric: str, totals_N: ArrayLike, weights_N: ArrayLike) -> Score:
    """``totals.sum() / weights.sum()`` over N pieces, by bootstrap over them; a single piece has no interval."""
    totals, weights = np.asarray(totals_N, dtype=np.float64), np.asarray(weights_N, dtype=np.float64)
    value = float(totals.sum() / weights.sum())
    if len(totals) == 1:
        return Score(metric, value, 1, None)
    return Score(metric, value, len(totals), bootstrap_ci95(totals, weights), "bootstrap")
