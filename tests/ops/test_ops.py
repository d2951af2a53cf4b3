"""Each fast operation equals its slow reference, computed in float64, in value and in every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benthic.ops.attention import causal_attention, causal_attention_reference
from benthic.ops.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from benthic.ops.experts import routed_experts, routed_experts_reference
from benthic.ops.norm import rms_norm, rms_norm_reference
from benthic.ops.rope import apply_rope, rotate_tail
from benthic.ops.swiglu import swiglu, swiglu_reference
from benthic.ops.total_norm import total_norm

Op = Callable[..., Tensor]


def assert_same(
    fast: Op, reference: Op, inputs: list[Tensor], *rest: object, tolerance: float = 2e-5, **named: object
) -> None:
    """Value and gradients of ``fast`` in fp32 against ``reference`` in float64, relative to the largest entry."""
    exact = [x.double().requires_grad_() for x in inputs]
    rough = [x.float().requires_grad_() for x in inputs]
    expected, actual = reference(*exact, *rest, **named), fast(*rough, *rest, **named)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    weight = torch.randn(expected.shape, dtype=torch.float64)
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
    found = [actual, *torch.autograd.grad((actual * weight.float()).sum(), rough)]
    for name, want, got in zip(("value", *(f"gradient {i}" for i in range(len(inputs)))), wanted, found, strict=True):
        assert got.shape == want.shape
        if want.numel() == 0:
            continue
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(0.1)
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 9, 33), (130, 96)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(sum(shape))
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])

    def written_out(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    assert_same(lambda x, w: rms_norm(x, w, 1e-6), written_out, [x, weight])


def test_rms_norm_of_a_slice_reads_only_the_slice() -> None:
    wide = torch.randn(4, 6, 20)
    part = wide[..., :12]
    assert torch.equal(rms_norm(part, torch.ones(12), 1e-6), rms_norm(part.clone(), torch.ones(12), 1e-6))


@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (2, 5, 66)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    assert_same(swiglu, swiglu_reference, [torch.randn(shape) * 4])


def test_swiglu_far_out() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(swiglu(gate_up), torch.tensor([[0.0, 200.0, 0.0, 0.0]]), atol=1e-30)


def test_nan_is_not_swallowed(kernels: str) -> None:
    assert swiglu(torch.tensor([[float("nan"), 1.0]])).isnan().all()
    assert rms_norm(torch.tensor([[float("nan"), 1.0]]), torch.ones(2), 1e-6).isnan().all()
    x = torch.ones(2, 4)
    x[1, 2] = float("nan")
    assert linear_cross_entropy(x, torch.ones(5, 4), torch.tensor([1, 2])).isnan()
    if kernels == "torch":
        return  # PyTorch's own attention on the CPU turns NaN scores into zeros
    q = torch.ones(1, 3, 1, 6)
    q[0, 1] = float("nan")
    out = causal_attention(q, torch.ones(1, 3, 1, 6), torch.ones(1, 3, 2), scale=1.0)
    assert out[0, 1].isnan().all()


def test_a_target_that_is_no_token_is_not_read(kernels: str) -> None:
    for target in (5, -1):
        nats = lambda: linear_cross_entropy(torch.ones(2, 4), torch.ones(5, 4), torch.tensor([1, target]))  # noqa: E731, B023
        if kernels == "native":
            assert nats().isnan()
        elif target >= 0:
            with pytest.raises((IndexError, RuntimeError)):
                nats()


def test_default_dtype_does_not_reach_the_kernels() -> None:
    q, kv, k_rope = torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 9), torch.randn(1, 20, 3)
    expected = causal_attention(q, kv, k_rope, scale=1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(causal_attention(q, kv, k_rope, scale=1.0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("heads", "kept", "pairs"), [(1, 0, 1), (3, 5, 4), (2, 16, 8)])
def test_rotate_tail(heads: int, kept: int, pairs: int) -> None:
    x, angle = torch.randn(2, 7, heads, kept + 2 * pairs), torch.rand(7, pairs) * 6

    def written_out(x: Tensor) -> Tensor:
        turn = torch.polar(torch.ones_like(angle.double()), angle.double())
        tail = torch.view_as_complex(x[..., kept:].unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
        return torch.cat((x[..., :kept], torch.view_as_real(tail).flatten(-2)), -1)

    assert_same(lambda x: rotate_tail(x, angle.cos(), angle.sin()), written_out, [x], tolerance=1e-6)
    whole = rotate_tail(x[..., kept:], angle.cos(), angle.sin())
    assert torch.allclose(whole, apply_rope(x[..., kept:], angle.cos(), angle.sin()), atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "time", "heads", "nope", "rope", "value"),
    [
        (1, 1, 1, 4, 2, 4),
        (2, 5, 3, 6, 4, 7),
        (1, 64, 2, 16, 8, 16),
        (2, 65, 1, 8, 2, 24),
        (1, 600, 2, 12, 4, 5),
        (2, 70, 3, 6, 0, 5),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_attention(batch: int, time: int, heads: int, nope: int, rope: int, value: int, documents: bool) -> None:
    torch.manual_seed(time)
    q, kv = torch.randn(batch, time, heads, nope + rope), torch.randn(batch, time, heads, nope + value)
    k_rope = torch.randn(batch, time, rope)
    document_BT = (torch.rand(batch, time) < 0.1).cumsum(1) if documents else None
    assert_same(
        causal_attention,
        causal_attention_reference,
        [q, kv, k_rope],
        scale=0.7,
        document_BT=document_BT,
        tolerance=5e-5,
    )


@pytest.mark.parametrize(("earlier", "time"), [(1, 2), (64, 65), (5, 130), (600, 70), (1024, 3)])
def test_attention_to_earlier_keys(earlier: int, time: int) -> None:
    torch.manual_seed(time)
    q, kv = torch.randn(2, time, 3, 12), torch.randn(2, earlier + time, 3, 15)
    k_rope = torch.randn(2, earlier + time, 4)
    inputs = [q, kv, k_rope]
    expected = causal_attention_reference(*(x.double() for x in inputs), scale=0.7)
    assert_same(causal_attention, causal_attention_reference, inputs, scale=0.7, tolerance=5e-5)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*inputs, scale=0.7).double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "hidden"),
    [(1, 1, 1, 3, 2), (5, 4, 2, 8, 6), (64, 6, 3, 12, 5), (700, 2, 1, 16, 9), (33, 32, 4, 20, 16)],
)
def test_routed_experts(tokens: int, experts: int, top_k: int, width: int, hidden: int) -> None:
    torch.manual_seed(tokens)
    scores = torch.rand(tokens, experts)
    scores[:, 0] += 0.5  # an uneven load, and experts that nobody chose
    index = scores.topk(top_k, -1).indices
    inputs = [
        torch.randn(tokens, width), torch.rand(tokens, top_k), torch.randn(experts, 2 * hidden, width),
        torch.randn(experts, width, hidden),
    ]  # fmt: skip
    assert_same(
        lambda x, gate, gate_up, down: routed_experts(x, index, gate, gate_up, down),
        lambda x, gate, gate_up, down: routed_experts_reference(x, index, gate, gate_up, down),
        inputs,
    )


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 2, 1), (7, 13, 5), (1030, 40, 8)])
def test_linear_cross_entropy(rows: int, vocabulary: int, width: int, few: bool) -> None:
    """Where most positions have a target, and where few have."""
    torch.manual_seed(rows)
    target = torch.randint(vocabulary, (rows,))
    ignored = torch.arange(rows) % 5 == 0
    target[~ignored if few else ignored] = IGNORE
    if rows > 1:
        x, weight = torch.randn(rows, width), torch.randn(vocabulary, width) * 2
        assert_same(
            lambda x, w: linear_cross_entropy(x, w, target),
            lambda x, w: torch.nn.functional.cross_entropy(x @ w.T, target, ignore_index=IGNORE),
            [x, weight],
        )
        assert torch.allclose(
            linear_cross_entropy_reference(x, weight, target), linear_cross_entropy(x, weight, target)
        )
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocabulary, width)
    nothing = linear_cross_entropy(x, weight, torch.full((rows,), IGNORE))
    nothing.backward()
    assert nothing == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_total_norm(scale: float) -> None:
    for sizes in ([(1,)], [(3, 5), (4096,), (4097,), (0,), (70, 90)], [(100_001,)]):
        tensors = [torch.randn(size) * scale for size in sizes]
        exact = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
        assert abs(total_norm(tensors) - exact) < 1e-6 * exact
        assert abs(total_norm([*tensors, torch.ones(4, 2).T * scale]) - (exact**2 + 8 * scale**2).sqrt()) < 1e-6 * (
            exact + 3 * scale
        )
    assert total_norm([torch.ones(5), torch.tensor([1.0, float("nan")])]).isnan()
    assert total_norm([torch.ones(5), torch.tensor([1.0, float("inf")])]).isinf()


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_many_positions_never_has_all_their_logits(dtype: torch.dtype) -> None:
    rows, vocabulary, width = 1800, 300, 8
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    target = torch.randint(vocabulary, (rows,))
    with LargestTensor() as seen:
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), target).backward()
    assert vocabulary < seen.numbers <= 512 * vocabulary
    exact = [value.detach().double().requires_grad_() for value in (x, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip((x.grad, weight.grad), (exact[0].grad, exact[1].grad), strict=True):
        assert (got.double() - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_as_close_to_float64_as_rounding_allows(seed: int) -> None:
    """Value and gradients of every operation, inputs and outputs rounded to bf16 and arithmetic in fp32."""
    torch.manual_seed(seed)
    tokens, index = 70, torch.rand(70, 5).topk(2, -1).indices
    angle, target = torch.rand(10, 3), torch.randint(9, (tokens,))
    gate = torch.rand(tokens, 2)
    scale, turn = 0.3, (angle.cos(), angle.sin())
    cases: list[tuple[Op, Op, list[Tensor]]] = [
        (
            lambda x, w: rms_norm(x, w, 1e-6),
            lambda x, w: rms_norm_reference(x, w, 1e-6),
            [torch.randn(tokens, 24), torch.randn(24)],
        ),
        (swiglu, swiglu_reference, [torch.randn(tokens, 24)]),
        (
            lambda x: rotate_tail(x, *turn),
            lambda x: torch.cat((x[..., :8], apply_rope(x[..., 8:], *turn)), -1),
            [torch.randn(2, 10, 3, 14)],
        ),
        (
            lambda q, kv, k: causal_attention(q, kv, k, scale=scale),
            lambda q, kv, k: causal_attention_reference(q, kv, k, scale=scale),
            [torch.randn(2, 90, 3, 12), torch.randn(2, 90, 3, 15), torch.randn(2, 90, 4)],
        ),
        (
            lambda q, kv: causal_attention(q, kv, q.new_empty(2, 90, 0), scale=scale),
            lambda q, kv: causal_attention_reference(q, kv, q.new_empty(2, 90, 0), scale=scale),
            [torch.randn(2, 90, 3, 8), torch.randn(2, 90, 3, 15)],
        ),
        (
            lambda x, gu, d: routed_experts(x, index, gate, gu, d),
            lambda x, gu, d: routed_experts_reference(x, index, gate.double(), gu, d),
            [torch.randn(tokens, 16), torch.randn(5, 12, 16) / 4, torch.randn(5, 16, 6) / 4],
        ),
        (
            lambda x, w: linear_cross_entropy(x, w, target),
            lambda x, w: torch.nn.functional.cross_entropy(x @ w.T, target),
            [torch.randn(tokens, 8), torch.randn(9, 8)],
        ),
    ]
    for fast, reference, inputs in cases:
        rounded = [x.bfloat16() for x in inputs]
        rough = [x.clone().requires_grad_() for x in rounded]
        exact = [x.double().requires_grad_() for x in rounded]
        actual, expected = fast(*rough), reference(*exact)
        weight = torch.randn(expected.shape).bfloat16()
        found = [actual, *torch.autograd.grad((actual * weight).sum(), rough)]
        wanted = [expected, *torch.autograd.grad((expected * weight.double()).sum(), exact)]
        for got, want in zip(found, wanted, strict=True):
            assert (got.double() - want).norm() < 0.02 * want.norm()
