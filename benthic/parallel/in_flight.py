"""What a rank of a pipeline holds for backward passes at worst, by the order in which it works.

A micro-batch's activations in a stage live from its forward pass to the end of its backward pass. Where that is split,
the gradient of the weights comes last, and frees them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benthic.parallel.schedules import Action, Computation, parts

_LAST_USES = (Computation.FULL_BACKWARD, Computation.BACKWARD_WEIGHT)


class InFlight(NamedTuple):
    """When a rank holds most."""

    bytes: float
    micro_batches: dict[int, int]
    """How many it holds then, by stage."""


def most_in_flight(order: Sequence[Action], kept: Mapping[int, float]) -> InFlight:
    """The most that a rank holds at a time.

    Args:
        order: its actions.
        kept: bytes of a micro-batch in each of its stages.
    """
    held = dict.fromkeys(kept, 0)
    most = InFlight(0.0, dict(held))
    for action in (part for pair in order for part in parts(pair)):
        stage, computation = action.stage_index, action.computation_type
        if computation == Computation.FORWARD:
            held[stage] += 1
        elif computation in _LAST_USES:
            held[stage] -= 1
        now = sum(kept[stage] * count for stage, count in held.items())
        if now > most.bytes:
            most = InFlight(now, dict(held))
    return most
