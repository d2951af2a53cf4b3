"""Matrix products of FP8 operands as DeepSeek-V3 trains with them (V3 report section 3.3.2).

Along the contracted dimension every 128 products are summed by themselves; the sum is rounded to fp32, multiplied by
the two scales that hold for it, and added to the result in fp32. Products of E4M3 numbers are multiples of 2^-18 below
2^18, so 128 of them sum exactly in float64 in whatever order: the result is the same, bit for bit, on every machine.

Dimensions: M, N outer, K contracted, Q = ceil(K / 128) blocks along it.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from benthic.precision import native_fp8, scaled_mm
from benthic.precision.blocks import BLOCK, SQUARE, dequantise_blocks, quantise_blocks, widen


@dataclass(frozen=True)
class Quantised:
    """A matrix (M, K), or a stack of them, in E4M3 with the scale of each block."""

    numbers: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def mT(self) -> Self:  # noqa: N802 - torch's name
        """Each matrix transposed."""
        return type(self)(self.numbers.mT, self.scales.mT, self.block[::-1])

    @property
    def parts(self) -> tuple[Tensor, Tensor, int]:
        """Numbers, scales, and how many rows share one."""
        return self.numbers, self.scales, self.block[0]

    def __getitem__(self, index: Any) -> Self:
        """Some matrices of a stack, or some rows if blocks are one row high."""
        return type(self)(self.numbers[index], self.scales[index], self.block)

    def dequantised(self) -> Tensor:
        """The numbers in fp32."""
        return dequantise_blocks(self.numbers, self.scales, self.block)

    def requantised(self, block: tuple[int, int], *, powers_of_two: bool = False) -> Self:
        """The same matrix in other blocks; exact with powers of two, but for numbers that become subnormal."""
        return type(self)(*quantise_blocks(self.dequantised(), block, powers_of_two=powers_of_two), block)


def quantise(x: Tensor, block: tuple[int, int] = SQUARE, *, powers_of_two: bool = False) -> Quantised:
    """A matrix in E4M3 with scales from its own largest numbers, as :func:`quantise_blocks`."""
    return Quantised(*quantise_blocks(x.detach(), block, powers_of_two=powers_of_two), block)


def product(a_MK: Quantised, b_NK: Quantised) -> Tensor:
    """``a b^T`` (M, N) in fp32. Blocks are 128 long in both, along K.

    On GPUs with FP8 units these do it; their sums of 128 are less exact (V3 report section 3.3.2).
    """
    if scaled_mm.usable(a_MK.numbers):
        return scaled_mm.product(a_MK.numbers, a_MK.scales, b_NK.numbers, b_NK.scales)
    if native_fp8.usable(a_MK.numbers, b_NK.numbers):
        return native_fp8.multiply(a_MK.parts, b_NK.parts)
    return emulated_product(a_MK, b_NK)


def emulated_product(a_MK: Quantised, b_NK: Quantised) -> Tensor:
    """``a b^T`` (M, N) in fp32, bit-exact everywhere: see the head of this file."""
    numbers_MK, numbers_NK = (widen(x.numbers, torch.float64) for x in (a_MK, b_NK))
    scale_MQ, scale_NQ = (_per_row(x) for x in (a_MK, b_NK))
    out_MN = numbers_MK.new_zeros(len(numbers_MK), len(numbers_NK), dtype=torch.float32)
    blocks = zip(numbers_MK.split(BLOCK, 1), numbers_NK.split(BLOCK, 1), scale_MQ.T, scale_NQ.T, strict=True)
    for block_Mk, block_Nk, scale_M, scale_N in blocks:
        sum_MN = (block_Mk @ block_Nk.T).float()
        out_MN += sum_MN.mul_(scale_M[:, None]).mul_(scale_N)
    return out_MN


def _per_row(x_MK: Quantised) -> Tensor:
    """Scale of each row in each of the Q blocks."""
    return x_MK.scales.repeat_interleave(x_MK.block[0], 0)[: len(x_MK.numbers)]
