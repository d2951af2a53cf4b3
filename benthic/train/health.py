"""Whether a step looks right: losses and gradients that are not finite, or far above those of the steps before.

Spikes of the loss are met by running the batch again, which tells a fault of the machine from what the data does, and
by skipping data (PaLM, arXiv 2204.02311 section 5.1).
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from benthic.errors import InputError

Policy = Literal["keep", "skip", "roll_back"]

WINDOW = 64
"""Steps that a new one is compared with."""
FEWEST = 16
"""Steps needed to compare at all."""
LOSS_SPREAD = 0.02
"""What a robust deviation of the loss is at least, as a share of it, lest a smooth course make each ripple a spike."""
GRADIENT_SPREAD = 0.25
"""The same of the gradient norm, which an odd but sound document may multiply by five."""
_NORMAL = 1.4826  # standard deviations in a median absolute deviation, of normally distributed numbers


class Trouble(StrEnum):
    """What is amiss with a step."""

    LOSS_NOT_FINITE = "loss not finite"
    GRADIENT_NOT_FINITE = "gradient not finite"
    LOSS_SPIKE = "loss spike"
    GRADIENT_SPIKE = "gradient spike"

    @property
    def finite(self) -> bool:
        """Whether it is a spike only."""
        return self in (Trouble.LOSS_SPIKE, Trouble.GRADIENT_SPIKE)


class Incident(NamedTuple):
    """A step in trouble, whose batch was run again."""

    trouble: Trouble
    loss: float
    grad_norm: float
    again: Trouble | None
    """What was amiss the second time; nothing if it was transient."""

    @property
    def kind(self) -> str:
        """``transient``, as a fault of the machine is, or ``reproducible``."""
        return "transient" if self.again is None else "reproducible"


class Health:
    """The losses and gradient norms of the last steps, and the judgement of a new one by them."""

    def __init__(self, on_spike: Policy = "keep", deviations: float = math.inf) -> None:
        self.on_spike, self._deviations = on_spike, deviations
        self.skipped = 0
        """Updates in a row that were not taken."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._grad_norms: deque[float] = deque(maxlen=WINDOW)

    def trouble(self, losses: Sequence[float], grad_norm: float) -> Trouble | None:
        """What is amiss with a step's losses, the main model's first, and its gradient."""
        if not all(map(math.isfinite, losses)):
            return Trouble.LOSS_NOT_FINITE
        if not math.isfinite(grad_norm):
            return Trouble.GRADIENT_NOT_FINITE
        if is_spike(losses[0], self._losses, self._deviations, LOSS_SPREAD):
            return Trouble.LOSS_SPIKE
        if is_spike(grad_norm, self._grad_norms, self._deviations, GRADIENT_SPREAD):
            return Trouble.GRADIENT_SPIKE
        return None

    def may_update(self, incident: Incident | None) -> bool:
        """Whether the step is taken: never if it is not finite, by ``on_spike`` if it spikes both times."""
        if incident is None or incident.again is None:
            return True
        return incident.again.finite and self.on_spike == "keep"

    def remember(self, loss: float, grad_norm: float, *, updated: bool) -> None:
        """Take a step into account; a spike too, so that what stays is no spike for ever."""
        self.skipped = 0 if updated else self.skipped + 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {"losses": list(self._losses), "grad_norms": list(self._grad_norms), "skipped": self.skipped}

    def restore(self, saved: Any, source: str) -> None:
        """Become what was saved. Raises InputError, naming ``source``, if it is no such thing."""
        match saved:
            case {"losses": [*losses], "grad_norms": [*grad_norms], "skipped": int(skipped)} if all(
                isinstance(number, float) for number in (*losses, *grad_norms)
            ):
                self.skipped = skipped
                self._losses = deque(losses, WINDOW)
                self._grad_norms = deque(grad_norms, WINDOW)
            case _:
                raise InputError(f"{source}: health={saved!r:.80} must hold losses, grad_norms and skipped")


def is_spike(value: float, before: Collection[float], deviations: float, least: float) -> bool:
    """Whether a positive value lies more than so many robust standard deviations above the median of those before it.

    Both are taken of logarithms, so that what counts is by what factor a value is larger. A robust standard deviation
    is 1.4826 times the median absolute deviation, and at least ``least``. Without 16 values to compare with, none is a
    spike.
    """
    if len(before) < FEWEST:
        return False
    logarithms = [_log(number) for number in before]
    median = statistics.median(logarithms)
    spread = _NORMAL * statistics.median(abs(number - median) for number in logarithms)
    return _log(value) > median + deviations * max(spread, least)


def _log(value: float) -> float:
    return math.log(max(value, sys.float_info.min))
