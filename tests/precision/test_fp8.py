"""Quantising and multiplying in FP8 against the same rounding in float64 and integers, bit for bit."""

import math

import numpy as np
import pytest
import torch

from benthic.precision.blocks import COLUMN_TILE, ROW_TILE, SQUARE, dequantise_blocks, quantise_blocks, widen
from benthic.precision.fp8 import Quantised, emulated_product, quantise

BLOCKS = [ROW_TILE, COLUMN_TILE, SQUARE]
TINY = 2.0**-149


def random_matrix(shape, seed, spread=20.0):
    """Numbers whose magnitudes differ by many powers of two, so that E4M3's subnormals and zero are reached."""
    generator = torch.Generator().manual_seed(seed)
    exponent = (torch.rand(shape, generator=generator) - 0.5) * spread
    return torch.randn(shape, generator=generator) * exponent.exp2()


def assert_quantised_as(slow, x, block, powers_of_two):
    numbers, scales = quantise_blocks(x, block, powers_of_two=powers_of_two)
    expected_numbers, expected_scales = slow.quantise(x.numpy(), block, powers_of_two)
    assert torch.equal(widen(numbers, torch.float64), torch.from_numpy(expected_numbers))
    corners = expected_scales[:: block[0], :: block[1]]
    assert torch.equal(scales, torch.from_numpy(corners.copy()))
    restored = (expected_numbers * expected_scales.astype(np.float64)).astype(np.float32)
    assert torch.equal(dequantise_blocks(numbers, scales, block), torch.from_numpy(restored))


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (3, 129), (130, 5), (257, 300)])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_tiles(slow, shape, block, powers_of_two, seed):
    assert_quantised_as(slow, random_matrix(shape, seed), block, powers_of_two)


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize(
    "largest", [0.0, TINY, 3 * TINY, 2.0**-127, 448 * 2.0**-126, 1e-30, 448.0, 449.0, 2.0**120, 3.0e38]
)
def test_zeros_subnormals_and_extremes(slow, largest, powers_of_two):
    shares = torch.tensor([1.0, -1.0, 0.5, 1 / 3, -0.0, 0.0, 1e-2, 1 / 448, 2.0**-15, 2.0**-16, 1e-7, 1e-20])
    assert_quantised_as(slow, (shares * largest).view(1, -1), ROW_TILE, powers_of_two)


def test_every_number_and_every_tie_between_two(slow):
    positive = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (positive[1:] + positive[:-1]) / 2
    around = torch.cat((ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(math.inf)), positive))
    values = torch.cat((around, -around)).unsqueeze(1)
    # 448 beside each makes its tile's scale 1.
    x = torch.cat((values, torch.full_like(values, 448.0)), 1)
    assert_quantised_as(slow, x, ROW_TILE, powers_of_two=False)
    numbers, _ = quantise_blocks(positive.unsqueeze(1).repeat(1, 2).index_fill_(1, torch.tensor(1), 448.0), ROW_TILE)
    assert torch.equal(numbers[:, 0].float(), positive)


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_never_becomes_finite(bad, powers_of_two):
    x = torch.randn(2, 256)
    x[0, 3] = bad
    restored = quantise(x, ROW_TILE, powers_of_two=powers_of_two).dequantised()
    assert restored[0, :128].isnan().all()
    assert restored[0, 128:].isfinite().all()
    assert restored[1].isfinite().all()


def test_stacked_matrices_are_quantised_one_by_one():
    x = random_matrix((3, 130, 140), 4)
    together = quantise(x)
    for matrix, quantised in zip(x, (together[i] for i in range(3)), strict=True):
        alone = quantise(matrix)
        assert torch.equal(quantised.scales, alone.scales)
        assert torch.equal(quantised.dequantised(), alone.dequantised())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_powers_of_two_make_requantising_exact(seed):
    x = random_matrix((300, 140), seed, spread=6.0)

    def errors(powers_of_two):
        rows = quantise(x, ROW_TILE, powers_of_two=powers_of_two)
        columns = rows.requantised(COLUMN_TILE, powers_of_two=powers_of_two)
        normal = columns.numbers.float().abs() > 2.0**-6
        assert normal.float().mean() > 0.9
        return (rows.dequantised() - columns.dequantised())[normal].count_nonzero()

    assert errors(powers_of_two=True) == 0
    assert errors(powers_of_two=False) > 1000


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 128, 3), (33, 129, 130), (130, 400, 20)])
@pytest.mark.parametrize("block", [ROW_TILE, SQUARE])
@pytest.mark.parametrize("seed", [0, 1])
def test_product_sums_in_blocks_and_promotes(slow, shape, block, seed):
    m, k, n = shape
    a, b = random_matrix((m, k), seed), random_matrix((n, k), seed + 10)
    found = emulated_product(quantise(a, ROW_TILE), quantise(b, block))
    assert found.dtype == torch.float32
    assert torch.equal(found, slow.product(slow.quantise(a.numpy(), ROW_TILE), slow.quantise(b.numpy(), block)))


def test_a_sum_of_128_is_exact_where_fp32_would_lose_digits(slow):
    # 448 x 448 beside the square of the smallest subnormal, 36 bits apart.
    row = torch.tensor([[448.0, 2.0**-9, -448.0]])
    q = Quantised(row.to(torch.float8_e4m3fn), torch.ones(1, 1), ROW_TILE)
    other = Quantised(row.abs().to(torch.float8_e4m3fn), torch.ones(1, 1), ROW_TILE)
    assert emulated_product(q, other).item() == 2.0**-18


def test_transposing_transposes_the_product():
    a, w = quantise(random_matrix((9, 130), 0), ROW_TILE), quantise(random_matrix((130, 200), 1))
    expected = emulated_product(a, quantise(w.dequantised().T.contiguous()))
    torch.testing.assert_close(emulated_product(a, w.mT), expected)
