"""FP8 products of rows in groups, each with a matrix of its own: what experts multiply, all of them in one call.

On CPUs one kernel goes through all groups; elsewhere each is a product by itself.

Dimensions: S rows in groups, E matrices, M and N outer, K contracted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.precision import native_fp8
from benthic.precision.blocks import COLUMN_TILE
from benthic.precision.fp8 import Quantised, product, quantise

_ROWS = 1024
"""Of a batch of groups: what is computed of them at once stays small, and so many are worth a call."""


@dataclass(frozen=True)
class Groups:
    """Groups of rows that follow one another: the first has number ``first``, and group g takes matrix ``g % E``."""

    start: int
    """The row at which they begin, of all rows of all groups."""
    first: int
    offsets: list[int]
    """Where each begins, counted from ``start``, and the end."""

    @property
    def rows(self) -> slice:
        """Among all rows."""
        return slice(self.start, self.start + self.offsets[-1])

    def ends(self) -> Tensor:
        """The offsets (G + 1,), for kernels."""
        return torch.tensor(self.offsets)

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Number and rows, counted from ``start``, of each group that has any."""
        for group, (begin, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if end > begin:
                yield self.first + group, slice(begin, end)


def batches(counts: Tensor) -> list[Groups]:
    """All groups, given the rows of each, in batches of some rows: a large group is one by itself."""
    found, start, first, offsets = [], 0, 0, [0]
    sizes: list[int] = counts.tolist()
    for number, size in enumerate(sizes):
        if offsets[-1] and offsets[-1] + size > _ROWS:
            found.append(Groups(start, first, offsets))
            start, first, offsets = start + offsets[-1], number, [0]
        offsets.append(offsets[-1] + size)
    return [*found, Groups(start, first, offsets)] if offsets[-1] else found


def multiply_groups(a_SK: Quantised, b_ENK: Quantised, groups: Groups) -> Tensor:
    """Each group's rows times its matrix transposed (S, N), in fp32. The blocks of ``a`` are one row high."""
    tensors = a_SK.numbers, b_ENK.numbers
    if native_fp8.usable(*tensors):
        return native_fp8.multiply(a_SK.parts, b_ENK.parts, groups.ends(), groups.first)
    out_SN = a_SK.scales.new_empty(len(tensors[0]), tensors[1].shape[1])
    for number, rows in groups:
        out_SN[rows] = product(a_SK[rows], b_ENK[number % len(tensors[1])])
    return out_SN


class Tokens(NamedTuple):
    """Rows of tokens that are to be quantised along them, in tiles of 128 x 1."""

    numbers: Tensor
    powers_of_two: bool


def add_products(out_EMN: Tensor, a_SM: Tokens, b_SN: Tokens, groups: Groups) -> None:
    """Add ``a^T b`` of each group to its matrix; no tile has rows of two groups."""
    if native_fp8.usable(out_EMN, a_SM.numbers, b_SN.numbers) and out_EMN.dtype in (torch.float32, torch.float64):
        ends = groups.ends()
        a, b = (native_fp8.quantise_columns(x.numbers, ends, x.powers_of_two) for x in (a_SM, b_SN))
        native_fp8.add_products(out_EMN, a, b, ends, groups.first)
        return
    for number, rows in groups:
        a_RM, b_RN = (quantise(x.numbers[rows], COLUMN_TILE, powers_of_two=x.powers_of_two) for x in (a_SM, b_SN))
        out_EMN[number % len(out_EMN)] += product(a_RM.mT, b_RN.mT)
