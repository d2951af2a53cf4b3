"""The kernels for FP8 against PyTorch's forms, bit for bit: odd and strided shapes, every dtype, what is not finite."""

import math

import pytest
import torch

from benthic.ops import native
from benthic.ops.experts import routed_experts_reference
from benthic.precision import fp8_groups, native_fp8
from benthic.precision.blocks import COLUMN_TILE, ROW_TILE, SQUARE, dequantise_blocks, quantise_blocks
from benthic.precision.fp8 import Quantised, emulated_product, product, quantise
from benthic.precision.fp8_experts import fp8_experts
from benthic.precision.fp8_groups import Groups, Tokens, batches
from tests.support import compiled

BLOCKS = [ROW_TILE, COLUMN_TILE, SQUARE]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEEDS = range(3)
_BITS = {1: torch.uint8, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def kernels():
    """Skips where there is nothing to compare."""
    if native.fp8_library() is None:
        compiled.missing("no kernels for FP8")


@pytest.fixture
def in_torch(monkeypatch):
    """Calls a function with PyTorch's forms."""

    def run(function, *args, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(native, "fp8_library", lambda: None)
            return function(*args, **settings)

    return run


def same_bits(found, expected):
    """Equal as bytes, and of one shape; any NaN is as good as another."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    nan = expected.double().isnan()
    assert torch.equal(found.double().isnan(), nan)
    found, expected = (x.contiguous().view(_BITS[x.itemsize])[~nan] for x in (found, expected))
    assert torch.equal(found, expected)


def wild(shape, seed, dtype=torch.float32):
    """Numbers of many magnitudes, some of them zero, subnormal or of the largest."""
    generator = torch.Generator().manual_seed(seed)
    exponent = (torch.rand(shape, generator=generator) - 0.5) * 24
    x = (torch.randn(shape, generator=generator) * exponent.exp2()).to(dtype)
    special = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-130), 2.0**-126, 3e38, -3e38, 1e-30]).to(dtype)
    where = torch.rand(shape, generator=generator) < 0.02
    picked = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(where, picked, x)


def shapes(seed):
    """A few odd ones, and stacks of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 400, (3, 2), generator=generator).tolist()
    return [*map(tuple, sizes), (1, 1), (3, 129, 70), (2, 2, 5, 260), (128, 1), (1, 700)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [*BLOCKS, (2, 3), (5, 700)])
@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_quantises_and_dequantises(in_torch, dtype, block, powers_of_two, seed):
    for shape in shapes(seed):
        x = wild(shape, seed, dtype)
        padded = torch.zeros(*shape[:-1], shape[-1] + 3, dtype=dtype)
        padded[..., 2:-1] = x
        for given in (x, padded[..., 2:-1], x.mT.contiguous().mT):
            found = quantise_blocks(given, block, powers_of_two=powers_of_two)
            expected = in_torch(quantise_blocks, x, block, powers_of_two=powers_of_two)
            for pair in zip(found, expected, strict=True):
                same_bits(*pair)
            same_bits(dequantise_blocks(*found, block), in_torch(dequantise_blocks, *expected, block))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_what_is_not_finite(in_torch, bad, block, powers_of_two):
    x = wild((140, 270), 0)
    x[3, 5], x[130, 200], x[7, 7] = bad, bad, -bad
    found = quantise(x, block, powers_of_two=powers_of_two)
    expected = in_torch(quantise, x, block, powers_of_two=powers_of_two)
    for pair in zip(found.parts[:2], expected.parts[:2], strict=True):
        same_bits(*pair)
    other = quantise(wild((9, 140), 1), ROW_TILE)
    if block != ROW_TILE:
        same_bits(product(other, found.mT), emulated_product(other, found.mT))


def test_every_number_is_widened_as_it_is(in_torch):
    numbers = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0], [2.0**-130]])
    found = dequantise_blocks(numbers, scales, ROW_TILE)
    same_bits(found, in_torch(dequantise_blocks, numbers, scales, ROW_TILE))
    q, one = Quantised(numbers.view(-1, 1), torch.ones(256, 1), ROW_TILE), quantise(torch.ones(1, 1))
    same_bits(product(q, one), emulated_product(q, one))


def factors(m, n, k, seed, block):
    """Of each kind that products have: as rows, and the transposed of columns."""
    a, b = wild((m, k), seed), wild((n, k), seed + 100)
    yield quantise(a, ROW_TILE), quantise(b, block)
    yield quantise(a.T.contiguous(), COLUMN_TILE).mT, quantise(b.T.contiguous(), block[::-1]).mT
    yield quantise(a, ROW_TILE), quantise(b.T.contiguous(), block[::-1]).mT


@pytest.mark.parametrize("block", [ROW_TILE, SQUARE])
@pytest.mark.parametrize("seed", SEEDS)
def test_products(block, seed):
    generator = torch.Generator().manual_seed(seed)
    for m, n, k in [*torch.randint(1, 420, (3, 3), generator=generator).tolist(), (1, 1, 1), (193, 257, 128)]:
        for a, b in factors(m, n, k, seed, block):
            same_bits(product(a, b), emulated_product(a, b))
            loose = Quantised(b.numbers.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2], b.scales, b.block)
            same_bits(product(a, loose), emulated_product(a, b))


def test_threads_change_nothing():
    a, b = quantise(wild((500, 300), 0), ROW_TILE), quantise(wild((600, 300), 1))
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outcomes.append((product(a, b), *quantise_blocks(wild((700, 200), 2))))
    finally:
        torch.set_num_threads(threads)
    for outcome in outcomes[1:]:
        for pair in zip(outcome, outcomes[0], strict=True):
            same_bits(*pair)


COUNTS = [[3, 0, 130, 1, 0, 40], [0, 0, 0, 5], [1], [900, 400, 0, 1200, 7, 7], [129] * 6]


def test_batches_cover_all_rows_once():
    for counts in [*COUNTS, [0, 0]]:
        numbers = [(number, groups.start + rows.start, rows.stop - rows.start)
                   for groups in batches(torch.tensor(counts)) for number, rows in groups]  # fmt: skip
        starts = [sum(counts[:number]) for number in range(len(counts))]
        assert numbers == [(i, start, size) for i, (start, size) in enumerate(zip(starts, counts, strict=True)) if size]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("matrices", [2, 6])
def test_products_of_groups(in_torch, counts, matrices):
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    x = wild((offsets[-1], 140), 3)
    weights = quantise(wild((matrices, 70, 140), 4)), quantise(wild((matrices, 140, 70), 5)).mT
    for first in (0, 1, 5):
        groups = Groups(0, first, offsets)
        for weight in weights:
            given = quantise(x, ROW_TILE), weight, groups
            same_bits(fp8_groups.multiply_groups(*given), in_torch(fp8_groups.multiply_groups, *given))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("matrices", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_groups_are_added(in_torch, counts, matrices, dtype):
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    a, b = Tokens(wild((offsets[-1], 70), 6), True), Tokens(wild((offsets[-1], 33), 7), False)
    for first in (0, 3):
        found = torch.randn(matrices, 70, 33, dtype=dtype)
        expected = found.clone()
        fp8_groups.add_products(found, a, b, Groups(0, first, offsets))
        in_torch(fp8_groups.add_products, expected, a, b, Groups(0, first, offsets))
        same_bits(found, expected)


@pytest.mark.parametrize("parts", [None, [30, 0, 60]])
@pytest.mark.parametrize("seed", SEEDS)
def test_experts(in_torch, parts, seed):
    torch.manual_seed(seed)
    x, dout = torch.randn(90, 136), torch.randn(90, 136)
    index = torch.rand(90, 6).topk(2).indices
    leaves = [x, torch.rand(90, 2), torch.randn(7, 72, 136) / 12, torch.randn(7, 136, 36) / 6]

    def run(function=fp8_experts, **settings):
        x, *rest = (leaf.clone().requires_grad_() for leaf in leaves)
        out = function(x, index, *rest, **settings)
        out.backward(dout)
        return [out.detach(), x.grad, *(leaf.grad for leaf in rest)]

    found = run(parts=parts)
    for pair in zip(found, in_torch(run, parts=parts), strict=True):
        same_bits(*pair)
    for result, exact in zip(found, run(routed_experts_reference), strict=True):
        assert (result - exact).norm() < 0.1 * exact.norm()


def test_other_tensors_take_the_form_in_torch():
    assert not native_fp8.usable(torch.empty(3, 4, device="meta"))
    assert not native_fp8.usable(torch.empty(0, 4))
    assert native_fp8.usable(torch.empty(3, 4))
