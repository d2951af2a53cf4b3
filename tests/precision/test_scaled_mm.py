"""Products on FP8 units against the emulation; runs where there are such units."""

import pytest
import torch

from benthic.precision import scaled_mm
from benthic.precision.blocks import ROW_TILE, SQUARE
from benthic.precision.fp8 import emulated_product, product, quantise


def fp8_units() -> bool:
    return torch.cuda.is_available() and scaled_mm.usable(torch.empty(0, device="cuda"))


def test_the_cpu_emulates():
    assert not scaled_mm.usable(torch.empty(1))


@pytest.mark.skipif(not fp8_units(), reason="needs a Hopper GPU and CUDA 12.9")
@pytest.mark.parametrize("block", [ROW_TILE, SQUARE])
@pytest.mark.parametrize("shape", [(128, 128, 128), (1, 7, 3), (130, 300, 129), (64, 1024, 512), (33, 2000, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_units_agree_with_the_emulation(shape, block, seed):
    generator = torch.Generator().manual_seed(seed)
    m, k, n = shape
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    expected = emulated_product(quantise(a, ROW_TILE), quantise(b, block))
    found = product(quantise(a.cuda(), ROW_TILE), quantise(b.cuda(), block)).cpu()
    # The units sum 128 products with some 14 bits (V3 report section 3.3.2).
    assert (found - expected).norm() <= 2e-3 * expected.norm()
