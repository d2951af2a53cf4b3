"""Shares with the interval that says how sure one may be of them."""

import math
from collections.abc import Sequence
from typing import Any

_Z = 1.959963984540054


def share(values: Sequence[float]) -> dict[str, Any]:
    """Mean of zeros and ones with its 95% interval (Wilson, JASA 22, 1927)."""
    n, mean = len(values), sum(values) / len(values)
    spread = _Z**2 / n
    middle = (mean + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(mean * (1 - mean) / n + spread / (4 * n))
    return {"value": mean, "n": n, "ci95": [max(middle - half, 0.0), min(middle + half, 1.0)]}
