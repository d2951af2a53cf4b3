"""Memory and messages of weights, gradients and optimizer state that are divided among ranks, by formula.

ZeRO (arXiv 1910.02054) as FSDP2 does it: what is gathered as one, a unit, lies on each rank as rows of each of its
weights, as many as on the rank with most (the last are padded). Under ZeRO-1 weights are whole from the first pass of
a step to the last, and gradients are added up whole. Under ZeRO-2 both are so during one pass only, and gradients are
reduced after each; under ZeRO-3 weights are gathered for each unit anew, forward and backward.

Messages are counted as what a rank sends in a ring. Gradients, and their sums, are fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from benthic.plan.traffic import gathered, summed

_EXACT = 4
Zero = Literal[1, 2, 3]


class Unit(NamedTuple):
    """Weights that are gathered as one. Numbers of elements, on the rank of those they are divided among."""

    whole: int
    held: int
    """By this rank."""
    optimizer_bytes: int
    """Of its state for what this rank holds."""
    padded: int
    """What is sent of it all: as much as if each rank had as many rows as the first."""
    ranks: int
    """It is divided among."""
    copies: int
    """Of all that, on other ranks yet."""
    gathered_bytes: int
    """Of a number of a gathered weight; 0 if it is never gathered, but used as it is held."""
    stays: bool = False
    """Gathered once a pass even under ZeRO-3."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one rank."""

    weights: int
    """As the optimizer has them, in fp32."""
    optimizer: int
    average: int
    """Of the weights, where one is kept."""
    gathered: int
    """Weights as they are used."""
    gradients: int
    messages: int
    """The largest unit's, on its way to be reduced."""


def state_memory(units: Sequence[Unit], *, zero: Zero, average: bool) -> StateMemory:
    """What a rank with these units holds in the last backward pass of a step, when it holds most.

    ``average`` says whether a moving average of the weights is kept.
    """
    held = sum(unit.held for unit in units)
    sent = [unit for unit in units if unit.gathered_bytes]
    alone = [unit for unit in units if not unit.gathered_bytes]
    again = [unit for unit in sent if zero == 3 and not unit.stays]
    largest = max((unit.padded for unit in sent), default=0)
    together = sum(unit.whole * unit.gathered_bytes for unit in sent if unit not in again)
    # One unit computes while the next one is gathered.
    together += 2 * max((unit.whole * unit.gathered_bytes for unit in again), default=0)
    gradients = sum(unit.whole for unit in (units if zero == 1 else alone))
    if zero > 1:
        gradients += sum(unit.held for unit in sent) + max((unit.whole for unit in sent), default=0)
    return StateMemory(
        weights=held * _EXACT,
        optimizer=sum(unit.optimizer_bytes for unit in units),
        average=held * _EXACT if average else 0,
        gathered=together,
        gradients=gradients * _EXACT,
        messages=largest * _EXACT,
    )


class StateMessages(NamedTuple):
    """Bytes that one rank sends in a step."""

    weights: float
    gradients: float
    copies: float
    """Summing gradients over copies of the model."""


def state_messages(units: Sequence[Unit], *, zero: Zero, passes: int) -> StateMessages:
    """In a step of so many forward and backward passes."""
    weights = gradients = copies = 0.0
    for unit in (unit for unit in units if unit.gathered_bytes):
        gatherings = {1: 1, 2: passes, 3: passes if unit.stays else 2 * passes}[zero]
        sums = 1 if zero == 1 else passes
        weights += gatherings * gathered(unit.padded * unit.gathered_bytes, unit.ranks)
        gradients += sums * gathered(unit.padded * _EXACT, unit.ranks)
        copies += sums * summed(unit.padded / unit.ranks * _EXACT, unit.copies)
    return StateMessages(weights, gradients, copies)
