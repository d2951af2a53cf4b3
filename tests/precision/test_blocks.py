"""FP8 blocks against a slow float64 reference, element by element."""

import pytest
import torch
from torch import Tensor

from benthic.precision.blocks import block_grid, dequantise_blocks, quantise_blocks

SHAPES = [(128, 128), (1, 1), (129, 127), (300, 513), (7, 400), (256, 1)]


def slow_dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """In float64, where the product of an E4M3 and an fp32 number is exact; then rounded once."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            out[row, column] = weight[row, column].double() * scale[row // 128, column // 128].double()
    return out.float()


@pytest.mark.parametrize("shape", [(129, 127), (7, 200), (1, 1), (131, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_dequantised_weight_equals_the_slow_reference_exactly(shape: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(block_grid(shape), generator=generator) * 10.0 ** torch.randint(-6, 3, (1,), generator=generator)
    found = dequantise_blocks(weight, scale)
    assert found.dtype == torch.float32
    assert torch.equal(found, slow_dequantise(weight, scale))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_block_is_quantised_by_its_own_largest_number(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    magnitude = 10.0 ** torch.randint(-8, 8, block_grid(shape), generator=generator)
    weight *= magnitude.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    quantised, scale = quantise_blocks(weight)
    assert quantised.shape == weight.shape
    assert quantised.dtype == torch.float8_e4m3fn
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            largest = weight[block].abs().max()
            torch.testing.assert_close(scale[row, column], largest / 448, rtol=1e-6, atol=0)
            assert quantised[block].float().abs().max() == 448
            # Half a unit in the last place of three mantissa bits, or of the smallest subnormal.
            error = (dequantise_blocks(quantised, scale) - weight)[block].abs()
            assert (error <= (weight[block].abs() / 16).clamp(min=float(scale[row, column]) * 2**-10) * 1.0001).all()


def test_blocks_of_zeros_stay_zero() -> None:
    weight = torch.zeros(130, 5)
    weight[129] = 3.0
    quantised, scale = quantise_blocks(weight)
    assert scale.flatten().tolist() == [1.0, pytest.approx(3.0 / 448)]
    torch.testing.assert_close(dequantise_blocks(quantised, scale), weight, rtol=1e-6, atol=0)


def test_scales_that_are_not_one_per_block_are_refused() -> None:
    weight = torch.zeros(129, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(1, 1\) do not fit a weight \(129, 128\)"):
        dequantise_blocks(weight, torch.ones(1, 1))
