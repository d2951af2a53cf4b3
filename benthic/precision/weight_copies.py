"""Weights in FP8, quantised once for all micro-batches of a step.

Weights change only when the optimizer updates them. Between two updates every pass multiplies by the same FP8 copy,
be it in another micro-batch, in a pipeline's backward pass long after the forward one, or to compute an activation
again. Each process has copies of what it computes with: of whole weights, also where they are divided among processes
and gathered for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from benthic.precision.fp8 import Quantised, quantise


class WeightCopies:
    """FP8 copies by weight, in blocks of 128 x 128. After :meth:`close` each call makes one anew."""

    def __init__(self) -> None:
        self._open = True
        self._found: dict[int, tuple[Tensor, int, Quantised]] = {}

    def __call__(self, weight: Tensor) -> Quantised:
        """The copy of a weight (..., M, N), as it is now. What has no gradients, as a reference, leaves none behind."""
        # Objects are told apart by number, which is theirs as long as they are kept here.
        known = self._found.get(id(weight))
        if known is not None and known[1] == weight._version:
            return known[2]
        copy = quantise(weight)
        if self._open and torch.is_grad_enabled():
            self._found[id(weight)] = weight, weight._version, copy
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.numbers.nbytes + copy.scales.nbytes for *_, copy in self._found.values())

    def close(self) -> None:
        """Forget all copies; passes that still need theirs keep them."""
        self._open = False
        self._found.clear()


_OF_STEP: ContextVar[WeightCopies | None] = ContextVar("_OF_STEP", default=None)


@contextmanager
def quantised_once() -> Iterator[WeightCopies]:
    """Within, passes in FP8 share their copies of weights. What changes these in place, as an optimizer does, makes
    new copies due; what is gathered anew from other processes must be the same, so a step ends before its update.
    """
    copies = WeightCopies()
    before = _OF_STEP.set(copies)
    try:
        yield copies
    finally:
        _OF_STEP.reset(before)
        copies.close()


def copies_of_step() -> WeightCopies:
    """Those of the step that runs; else closed ones, which share nothing."""
    copies = _OF_STEP.get()
    if copies is None:
        copies = WeightCopies()
        copies.close()
    return copies
