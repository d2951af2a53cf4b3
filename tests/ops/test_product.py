"""Products of fp32 matrices: as exact as fp32, in every layout, and each number the same in any company."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.ops import native
from benthic.ops.product import linear, product


def laid_out(x: Tensor, *, across: bool, spare: int) -> Tensor:
    """The same matrix with its first dimension dense instead of its second, and a gap between rows (or columns)."""
    rows = x.T if across else x
    wide = torch.full((rows.shape[0], rows.shape[1] + spare), float("nan"))
    wide[:, : rows.shape[1]] = rows
    view = wide[:, : rows.shape[1]]
    return view.T if across else view


def error(found: Tensor, a: Tensor, b: Tensor, added: Tensor | None = None) -> float:
    """Largest error as a share of what rounding to fp32 may cost: the sum of the absolute values that were added."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if added is not None:
        exact, size = exact + added.double(), size + added.double().abs()
    return float(((found.double() - exact).abs() / size.clamp_min(1e-300)).max())


SHAPES = [(32, 32, 32), (130, 97, 101), (64, 300, 513), (33, 1100, 1090), (700, 129, 40), (257, 260, 1300)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("across_a", "across_b"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_product_is_as_exact_as_fp32(shape: tuple[int, int, int], across_a: bool, across_b: bool) -> None:
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    # Rows of very different sizes: an error must be small beside its own row's numbers.
    a = torch.randn(m, k, generator=generator) * torch.logspace(-12, 12, m)[:, None]
    b = torch.randn(k, n, generator=generator) * torch.logspace(-6, 9, n)
    a, b = laid_out(a, across=across_a, spare=5), laid_out(b, across=across_b, spare=3)
    assert error(product(a, b), a, b) < 1e-6
    wide = torch.randn(m, n + 7, generator=generator)
    before, out = wide.clone(), wide[:, :n]
    product(a, b, out_MN=out)
    assert error(out, a, b) < 1e-6
    product(a, b, out_MN=out.copy_(before[:, :n]), add=True)
    assert error(out, a, b, before[:, :n]) < 1e-6
    assert torch.equal(wide[:, n:], before[:, n:]), "written beyond the result"


def test_every_bit_of_a_number_counts() -> None:
    one = torch.eye(64)
    x = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1) * 2.0 ** torch.arange(-32, 32)
    for found in (product(x, one), product(one, x), product(x.T, one).T):
        torch.testing.assert_close(found, x, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_the_same_in_any_company(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, n = (int(x) for x in torch.randint(200, 700, (2,), generator=generator))
    a, weight = torch.randn(900, k, generator=generator), torch.randn(n, k, generator=generator)
    if not native.usable(a, weight) or not native.has_tiles():
        pytest.skip("only tiles promise it")
    whole = product(a, weight.T)
    assert torch.equal(product(a, weight.T), whole)
    for rows in (slice(0, 800), slice(37, 900), slice(100, 868)):  # still more rows than columns
        assert torch.equal(product(a[rows], weight.T), whole[rows])


@pytest.mark.parametrize("shape", [(1,), (31,), (40,), (3, 50), (2, 5, 67)])
def test_linear_and_its_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, 96, generator=generator, requires_grad=True)
    weight = torch.randn(130, 96, generator=generator, requires_grad=True)
    dy = torch.randn(*shape, 130, generator=generator)
    found = linear(x, weight)
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight), dy), torch.autograd.grad(exact, (x, weight), dy.double()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), found)


def test_nan_and_infinity_come_out_as_no_number() -> None:
    a, b = torch.ones(64, 64), torch.ones(64, 64)
    a[3, 5], a[40, 1] = float("nan"), float("inf")
    found = product(a, b).isfinite()
    assert not found[3].any()
    assert not found[40].any()
    assert int(found.sum()) == 62 * 64


def test_under_autocast_linear_computes_as_pytorch_does() -> None:
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
