"""Products on vector units, and of fp32 on tiles: exact, each number the same in any company, and only where wanted."""

import ctypes
import dataclasses
import itertools
import platform
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benthic.config.presets import PRESETS
from benthic.model import build_model
from benthic.ops import native
from benthic.ops.attention import causal_attention, causal_attention_reference
from benthic.ops.cross_entropy import linear_cross_entropy
from benthic.ops.experts import routed_experts, routed_experts_reference
from benthic.ops.native import build
from benthic.ops.norm import rms_norm
from benthic.ops.product import Units, multiply, own_products, said_of_kernels, units_here
from benthic.ops.rope import rotate_tail


@pytest.fixture(params=[Units.VECTORS, Units.TILES], ids=["vectors", "tiles"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Units:
    """What inside of ``own_products`` multiplies: either, whatever would be chosen on this processor."""
    wanted: Units = request.param
    if not native.usable(torch.zeros(1)):
        return Units.BLAS
    if wanted == Units.TILES and not native.has_tiles():
        pytest.skip("no tiles here")
    monkeypatch.setattr(native, "has_tiles", lambda: wanted == Units.TILES)
    monkeypatch.setattr(native, "has_fast_vectors", lambda: True)
    return wanted


own = partial(own_products, tiles=True)


def laid_out(x: Tensor, *, across: bool, spare: int) -> Tensor:
    """The same matrix with its first dimension dense instead of its second, and a gap between rows (or columns)."""
    rows = x.T if across else x
    wide = torch.full((rows.shape[0], rows.shape[1] + spare), float("nan"), dtype=x.dtype)
    wide[:, : rows.shape[1]] = rows
    view = wide[:, : rows.shape[1]]
    return view.T if across else view


def product(units: Units, a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """``a @ b`` by the kernel, into or added to ``out``."""
    if not native.usable(a, b) or (units == Units.BLAS and a.dtype == torch.float32):
        pytest.skip("a kernel's own test")
    (m, k), n = a.shape, b.shape[1]
    (x, across_a, lda), (y, across_b, ldb) = (
        (z, 0, z.stride(0)) if z.stride(1) == 1 else (z, 1, z.stride(1)) for z in (a, b)
    )
    out = torch.full((m, n), float("nan")) if out is None else out
    native.call("product", x, across_a, lda, y, across_b, ldb, out, out.stride(0), m, n, k, int(add), int(units))
    return out


def error(found: Tensor, a: Tensor, b: Tensor, added: Tensor | None = None) -> float:
    """Largest error as a share of what rounding to fp32 may cost: the sum of the absolute values that were added."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if added is not None:
        exact, size = exact + added.double(), size + added.double().abs()
    return float(((found.double() - exact).abs() / size.clamp_min(1e-300)).max())


SHAPES = [
    (32, 32, 32), (130, 97, 101), (64, 300, 513), (33, 1100, 1090), (700, 129, 40), (257, 260, 1300), (14, 330, 1024),
    (17, 200, 700), (500, 47, 999), (5, 4, 515), (1, 3, 2), (300, 2, 7), (12, 33, 16), (14, 330, 2048), (9, 40, 2501),
]  # fmt: skip


PRODUCTS = list(itertools.product(SHAPES, (False, True), (False, True)))
Shape = tuple[int, int, int]


def assert_exact(units: Units, shape: Shape, across_a: bool, across_b: bool, dtype: torch.dtype) -> None:
    """A product of random factors, into a matrix and added to one, is within rounding of fp32."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    # Rows of very different sizes: an error must be small beside its own row's numbers.
    a = torch.randn(m, k, generator=generator) * torch.logspace(-12, 12, m)[:, None]
    b = torch.randn(k, n, generator=generator) * torch.logspace(-6, 9, n)
    a, b = a.to(dtype), b.to(dtype)
    a, b = laid_out(a, across=across_a, spare=5), laid_out(b, across=across_b, spare=3)
    assert error(product(units, a, b), a, b) < 1e-6
    wide = torch.randn(m, n + 7, generator=generator)
    before, out = wide.clone(), wide[:, :n]
    product(units, a, b, out)
    assert error(out, a, b) < 1e-6
    product(units, a, b, out.copy_(before[:, :n]), add=True)
    assert error(out, a, b, before[:, :n]) < 1e-6
    assert torch.equal(wide[:, n:], before[:, n:]), "written beyond the result"


of_any_shape = pytest.mark.parametrize(("shape", "across_a", "across_b"), PRODUCTS)


@of_any_shape
def test_a_product_is_as_exact_as_fp32(units: Units, shape: Shape, across_a: bool, across_b: bool) -> None:
    assert_exact(units, shape, across_a, across_b, torch.float32)


@pytest.mark.parametrize("units", [Units.VECTORS, Units.BLAS], ids=["vectors", "blas"])
@of_any_shape
def test_a_product_of_bf16_is_as_exact_as_fp32(units: Units, shape: Shape, across_a: bool, across_b: bool) -> None:
    assert_exact(units, shape, across_a, across_b, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 architectures")
@pytest.mark.parametrize(
    ("architecture", "feature"), [("x86-64", "sse2"), ("haswell", "avx2"), ("skylake-avx512", "avx512vl")]
)
def test_vector_units_of_any_width(
    architecture: str, feature: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch" or feature not in build._processor():
        pytest.skip("a kernel's own test, on a processor that can run it")
    monkeypatch.setattr(native, "_load", lambda: (compiled_for(architecture, tmp_path), "compiled for a test"))
    for shape, across_a, across_b in PRODUCTS:
        for dtype in (torch.float32, torch.bfloat16):
            assert_exact(Units.VECTORS, shape, across_a, across_b, dtype)


def compiled_for(architecture: str, folder: Path) -> ctypes.CDLL:
    """The kernels for another processor."""
    recipe, target = build._LIBRARIES["kernels"], folder / f"{architecture}.so"
    if not target.exists():
        flags = (*recipe.flags, f"-march={architecture}")
        build._compile(build._compiler(), dataclasses.replace(recipe, flags=flags), target)
    return ctypes.CDLL(str(target))


def test_every_bit_of_a_number_counts(units: Units) -> None:
    one = torch.eye(64)
    x = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1) * 2.0 ** torch.arange(-32, 32)
    for found in (product(units, x, one), product(units, one, x), product(units, x.T, one).T):
        torch.testing.assert_close(found, x, rtol=0, atol=0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_is_the_same_in_any_company_and_on_any_threads(
    units: Units, dtype: torch.dtype, seed: int, threads: Callable[[int], None]
) -> None:
    """With more rows than columns and with fewer, which exchanges the factors."""
    generator = torch.Generator().manual_seed(seed)
    k, n = (int(x) for x in torch.randint(200, 1200, (2,), generator=generator))
    if dtype == torch.bfloat16 and units == Units.TILES:
        pytest.skip("of fp32 only")
    a, weight = (torch.randn(rows, k, generator=generator).to(dtype) for rows in (900, n))
    whole = product(units, a, weight.T)
    for count in (1, 2, 3):
        threads(count)
        for rows in (slice(0, 900), slice(0, 800), slice(37, 900), slice(0, 300), slice(350, 450), slice(350, 370)):
            assert torch.equal(product(units, a[rows], weight.T), whole[rows])


def test_nan_and_infinity_come_out_as_no_number(units: Units) -> None:
    a, b = torch.ones(64, 64), torch.ones(64, 64)
    a[3, 5], a[40, 1] = float("nan"), float("inf")
    found = product(units, a, b).isfinite()
    assert not found[3].any()
    assert not found[40].any()
    assert int(found.sum()) == 62 * 64


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """The native kernels that run, each with its last argument: the units, for attention, experts and products."""
    calls: list[tuple[str, object]] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *args: calls.append((name, args[-1])) or call(name, *args))
    return calls


@pytest.mark.parametrize("shape", [(1,), (31,), (40,), (3, 50), (2, 5, 67)])
@torch.no_grad()
def test_linear_layers(units: Units, shape: tuple[int, ...], called: list[tuple[str, object]]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x, layer = torch.randn(*shape, 96, generator=generator), torch.nn.Linear(96, 130, bias=False)
    with own(x):
        found, across = layer(x), F.linear(x.mT.contiguous().mT, layer.weight) if x.ndim > 1 else None
        with_bias = F.linear(x, layer.weight, torch.ones(130))
    exact = F.linear(x.double(), layer.weight.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_bias.double(), exact + 1, rtol=1e-5, atol=1e-5)
    assert across is None or torch.equal(found, across)
    if units:
        rows = x.numel() // 96
        enough = rows >= 32 if units == Units.TILES else rows * 96 * 130 >= 2**21
        assert [name for name, _ in called] == ["product"] * (2 if enough and x.ndim > 1 else 0)


@pytest.mark.parametrize(("earlier", "time"), [(0, 130), (0, 512), (70, 200), (1100, 257)])
@torch.no_grad()
def test_attention(units: Units, earlier: int, time: int, called: list[tuple[str, object]]) -> None:
    torch.manual_seed(time)
    q, kv = torch.randn(2, time, 2, 160), torch.randn(2, earlier + time, 2, 192)
    k_rope = torch.randn(2, earlier + time, 32)
    with own(q):
        found = causal_attention(q, kv, k_rope, scale=0.3)
    expected = causal_attention_reference(q.double(), kv.double(), k_rope.double(), scale=0.3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)
    assert not units or ("attention_forward", units) in called


@torch.no_grad()
@pytest.mark.usefixtures("units")
def test_attention_stays_within_documents() -> None:
    torch.manual_seed(0)
    q, kv, k_rope = torch.randn(1, 300, 2, 160), torch.randn(1, 300, 2, 192), torch.randn(1, 300, 32)
    document = torch.tensor([0] * 130 + [1] * 3 + [2] * 167)[None]
    with own(q):
        found = causal_attention(q, kv, k_rope, scale=0.3, document_BT=document)
    expected = causal_attention_reference(q.double(), kv.double(), k_rope.double(), scale=0.3, document_BT=document)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("tokens", [40, 600])
@torch.no_grad()
def test_experts(units: Units, tokens: int, called: list[tuple[str, object]]) -> None:
    torch.manual_seed(tokens)
    x, index = torch.randn(tokens, 96), torch.rand(tokens, 5).topk(2, -1).indices
    gate, gate_up, down = torch.rand(tokens, 2), torch.randn(5, 160, 96) * 0.1, torch.randn(5, 96, 80) * 0.1
    with own(x):
        found = routed_experts(x, index, gate, gate_up, down)
    expected = routed_experts_reference(x.double(), index, gate.double(), gate_up.double(), down.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert not units or ("experts_forward", units) in called


def gradients_of(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The outcome, and gradients of its sum weighted at random, of those inputs that have any."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def assert_gradients_close(function: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Forward inside of ``own_products``, backward outside, against float64."""

    def own_forward(*leaves: Tensor) -> Tensor:
        with own(inputs[0]):
            return function(*leaves)

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for found, expected in zip(gradients_of(own_forward, *inputs), gradients_of(exact, *wide), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(240,), (3, 90), (2, 5, 67)])
def test_gradients_of_linear_layers(units: Units, shape: tuple[int, ...], called: list[tuple[str, object]]) -> None:
    torch.manual_seed(sum(shape))
    x, weight = torch.randn(*shape, 96), torch.randn(130, 96)
    assert_gradients_close(F.linear, F.linear, x, weight)
    if units:
        assert [name for name, _ in called] == ["product"] * 3


@pytest.mark.usefixtures("units")
def test_what_does_not_lie_in_rows_or_columns_is_multiplied_too() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96), torch.randn(130, 96)
    spread, narrow = torch.randn(1, 96).expand(64, 96), torch.randn(64, 1).T
    with torch.no_grad(), own(x):
        for a, b in ((spread, weight.T), (x, spread.T), (weight[:, :64], narrow.T), (x[::2, ::3], weight[:, ::3].T)):
            out = torch.full((a.shape[0], b.shape[1]), float("nan"))
            multiply(a, b, out)
            torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(F.linear(x, weight[0]), x @ weight[0])


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_gradients_that_are_wanted_are_computed(
    units: Units, frozen: str, called: list[tuple[str, object]]
) -> None:
    x, layer = torch.randn(240, 96, requires_grad=frozen != "x"), torch.nn.Linear(96, 130, bias=False)
    layer.requires_grad_(frozen != "weight")
    with own(x):
        layer(x).sum().backward()
    assert (x.grad is None, layer.weight.grad is None) == (frozen == "x", frozen == "weight")
    if units:
        assert [name for name, _ in called] == ["product"] * 2


@pytest.mark.parametrize(("time", "documents"), [(130, False), (300, True), (515, False)])
def test_gradients_of_attention(units: Units, time: int, documents: bool, called: list[tuple[str, object]]) -> None:
    torch.manual_seed(time)
    q, kv, k_rope = torch.randn(2, time, 2, 160), torch.randn(2, time, 2, 192), torch.randn(2, time, 32)
    document = torch.rand(2, time).lt(0.02).cumsum(1) if documents else None
    assert_gradients_close(
        partial(causal_attention, scale=0.3, document_BT=document),
        partial(causal_attention_reference, scale=0.3, document_BT=document), q, kv, k_rope,
    )  # fmt: skip
    assert not units or ("attention_backward", units) in called


@pytest.mark.parametrize("tokens", [40, 600])
def test_gradients_of_experts(units: Units, tokens: int, called: list[tuple[str, object]]) -> None:
    torch.manual_seed(tokens)
    x, index = torch.randn(tokens, 128), torch.rand(tokens, 5).topk(2, -1).indices
    gate, gate_up, down = torch.rand(tokens, 2), torch.randn(5, 256, 128) * 0.1, torch.randn(5, 128, 128) * 0.1
    assert_gradients_close(routed_experts, routed_experts_reference, x, index, gate, gate_up, down)
    assert not units or ("experts_backward", units) in called


@pytest.mark.parametrize("positions", [100, 700])
def test_gradients_of_cross_entropy(units: Units, positions: int, called: list[tuple[str, object]]) -> None:
    torch.manual_seed(positions)
    x, head, target = torch.randn(positions, 128), torch.randn(300, 128) * 0.1, torch.randint(300, (positions,))
    assert_gradients_close(
        linear_cross_entropy, lambda x, head, target: F.cross_entropy(x @ head.T, target), x, head, target
    )
    if units:
        assert [name for name, _ in called].count("product") == 3 * -(-positions // 512)


@pytest.mark.parametrize("fast", [True, False])
def test_kernels_of_bf16_use_vector_units_wherever_the_blas_is_slow(
    fast: bool, called: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside of ``own_products`` or not; gradients of the head are summed in fp32."""
    if not native.usable(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("no kernels of bf16")
    monkeypatch.setattr(native, "has_fast_vectors", lambda: fast)
    torch.manual_seed(0)
    x, index = torch.randn(70, 64).bfloat16(), torch.rand(70, 4).topk(2, -1).indices
    gate, gate_up, down = torch.rand(70, 2), torch.randn(4, 48, 64).bfloat16(), torch.randn(4, 64, 24).bfloat16()
    q, kv, k_rope = (torch.randn(*shape).bfloat16() for shape in ((1, 70, 2, 48), (1, 70, 2, 64), (1, 70, 16)))
    head, target = torch.randn(90, 64).bfloat16() * 0.1, torch.randint(90, (70,))
    for kernel, reference, *inputs in (
        (routed_experts, routed_experts_reference, x, index, gate, gate_up, down),
        (partial(causal_attention, scale=0.3), partial(causal_attention_reference, scale=0.3), q, kv, k_rope),
        (linear_cross_entropy, lambda x, head, target: F.cross_entropy(x @ head.T, target), x, head, target),
    ):
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        for found, exact in zip(gradients_of(kernel, *inputs), gradients_of(reference, *wide), strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-2 * float(exact.abs().max()))
    forward_and_back = ("experts_forward", "experts_backward", "attention_forward", "attention_backward", "product")
    assert [units for name, units in called if name in forward_and_back] == [Units.VECTORS if fast else Units.BLAS] * 5


def gradients(seed: int) -> list[Tensor]:
    """Loss and all gradients of a small model on a batch."""
    config = PRESETS["nano"].model_copy(update={"num_hidden_layers": 2})
    model = build_model(config, seed=seed).transformer
    tokens = torch.randint(config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(seed))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_model_s_gradients_are_the_same_up_to_rounding(units: Units, called: list[tuple[str, object]]) -> None:
    expected = gradients(seed=2)
    assert "product" not in [name for name, _ in called]
    with own(torch.zeros(1)):
        found, again = gradients(seed=2), gradients(seed=2)
    assert ("product" in [name for name, _ in called]) == bool(units)
    for one, same, other in zip(found, again, expected, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_another_thread_s_training_is_the_same_bit_for_bit_beside_it(
    units: Units, called: list[tuple[str, object]]
) -> None:
    expected = gradients(seed=2)
    beside: list[Tensor] = []
    with torch.no_grad(), own(torch.zeros(1)):
        assert units_here() == units
        trainer = threading.Thread(target=lambda: beside.extend(gradients(seed=2)))
        trainer.start()
        trainer.join()
    assert len(beside) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(beside, expected, strict=True))
    assert ("product", units) not in called
    assert not {("experts_forward", units), ("attention_forward", units)} & set(called) or not units


@torch.inference_mode()
def test_it_ends_with_its_block_and_is_only_for_fp32_on_the_cpu(units: Units) -> None:
    weight = torch.zeros(1)
    with own(weight), own(weight):
        assert units_here() == units
    assert not units_here()
    with pytest.raises(IndexError), own(weight):
        weight[1]
    assert not units_here()
    said = {Units.BLAS: "", Units.VECTORS: "on vector units", Units.TILES: "on bf16 tiles"}[units]
    assert said_of_kernels(weight, tiles=True).endswith(said)
    assert ("on vector units" in said_of_kernels(weight.bfloat16(), tiles=True)) == (units == Units.VECTORS)
    for other in (weight.double(), torch.zeros(1, device="meta"), torch.zeros(1, device="meta").bfloat16()):
        assert "units" not in said_of_kernels(other, tiles=True)
        assert "tiles" not in said_of_kernels(other, tiles=True)
        with own(other), own(weight.bfloat16()):
            assert not units_here()
    with torch.autocast("cpu", dtype=torch.bfloat16), own(weight):
        assert not units_here()
    with own_products(weight, tiles=False):
        assert units_here() == min(units, Units.VECTORS)


def test_all_of_it_can_be_left_to_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTHIC_NATIVE", "blas")
    weight = torch.zeros(1)
    with own(weight):
        assert not units_here()
    assert said_of_kernels(weight, tiles=True) == native.status()


@torch.no_grad()
@pytest.mark.usefixtures("units")
def test_gradients_that_are_wanted_inside_after_all_come_out() -> None:
    x, layer = torch.randn(40, 64), torch.nn.Linear(64, 50, bias=False)
    with own(x), torch.enable_grad():
        (found,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(found, x.sum(0).expand(50, -1), rtol=1e-5, atol=1e-5)


class Asked(TorchFunctionMode):
    """Counts what such a mode, as that of ``own_products`` is one, is asked."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_kernels_do_not_ask_the_mode_that_replaces_linear_layers(kernels: str) -> None:
    if kernels != "native":
        pytest.skip("of the native kernels")
    x, weight, cos, sin = torch.randn(3, 5, 64), torch.ones(64), torch.randn(5, 4), torch.randn(5, 4)
    q, kv, rope = torch.randn(3, 5, 2, 24), torch.randn(3, 5, 2, 32), torch.randn(3, 5, 8)
    with Asked() as asked:
        found = rms_norm(x, weight, 1e-6)
        causal_attention(q, kv, rope, scale=0.2)
        rotate_tail(q, cos, sin)
    assert asked.count == 0
    torch.testing.assert_close(found, F.rms_norm(x, (64,), weight, 1e-6))
