"""FP8 written a second time, in numpy and integers, slowly: what the product must equal bit for bit."""

from math import frexp, ldexp
from types import SimpleNamespace

import numpy as np
import pytest
import torch

F32 = np.float32


def round_to_e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest E4M3 number, ties to even, in float64: 3 mantissa bits from 2^-6 up, multiples of 2^-9 below, to 448."""
    x = x.astype(np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    units = np.ldexp(np.abs(x), 3 - exponent)
    whole = np.floor(units)
    rest, odd = units - whole, whole % 2 == 1
    whole += (rest > 0.5) | ((rest == 0.5) & odd)
    return np.copysign(np.minimum(np.ldexp(whole, exponent - 3), 448.0), x)


def scale_of(tile: np.ndarray, powers_of_two: bool) -> np.float32:
    largest = float(np.abs(tile).max())
    if largest == 0:
        return F32(1)
    scale = F32(max(F32(largest / 448), ldexp(1, -126)))
    if powers_of_two:
        mantissa, exponent = frexp(float(scale))
        scale = F32(ldexp(1, exponent - (mantissa == 0.5)))
    return scale


def quantise(x: np.ndarray, block: tuple[int, int], powers_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 numbers as float64 (M, N), and the scale of each number's block (M, N)."""
    numbers, scales = np.empty(x.shape), np.empty(x.shape, F32)
    for row in range(0, x.shape[0], block[0]):
        for column in range(0, x.shape[1], block[1]):
            tile = np.s_[row : row + block[0], column : column + block[1]]
            scales[tile] = scale_of(x[tile], powers_of_two)
            quotient = (x[tile].astype(np.float64) / scales[tile].astype(np.float64)).astype(F32)
            numbers[tile] = round_to_e4m3(quotient)
    return numbers, scales


def requantise(numbers: np.ndarray, scales: np.ndarray, block: tuple[int, int], powers_of_two: bool = False):
    return quantise((numbers * scales.astype(np.float64)).astype(F32), block, powers_of_two)


def product(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """``a b^T``: each 128 products summed in integers, rounded to fp32, scaled and added in fp32."""
    (a_MK, scale_a), (b_NK, scale_b) = a, b
    out = np.zeros((len(a_MK), len(b_NK)), F32)
    for start in range(0, a_MK.shape[1], 128):
        part = np.s_[:, start : start + 128]
        units = (a_MK[part] * 512).astype(np.int64) @ (b_NK[part] * 512).astype(np.int64).T
        block_sum = np.ldexp(units.astype(np.float64), -18).astype(F32)
        out += block_sum * scale_a[:, start, None] * scale_b[None, :, start]
    return torch.from_numpy(out)


def transposed(quantised: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return quantised[0].T, quantised[1].T


@pytest.fixture(scope="session")
def slow() -> SimpleNamespace:
    """The reference's functions."""
    return SimpleNamespace(
        round_to_e4m3=round_to_e4m3, quantise=quantise, requantise=requantise, product=product, transposed=transposed
    )
