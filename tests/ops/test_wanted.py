"""Backward passes asked for inputs first and weights later, as pipelines ask: each half is computed once, and right."""

import pytest
import torch

from benthic.ops import cross_entropy, experts, wanted
from benthic.precision import fp8_experts, fp8_linear

ASKED = []


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, number, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight * number

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        ASKED.append(wanted.wanted(ctx))
        return grads[0] @ weight.T * 2, None, x.T @ grads[0] * 2


def test_what_is_asked_for_is_told_whether_leaf_or_not():
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    for left, right in ((x, weight), (x * 1, weight), (x, weight * 1), (x * 1, weight * 1)):
        ASKED.clear()
        out = _Pair.apply(left, 2, right).sum()
        torch.autograd.grad(out, [x], retain_graph=True)
        torch.autograd.grad(out, [weight], retain_graph=True)
        out.backward()
        assert ASKED == [[True, False], [False, True], [True, True]]
    ASKED.clear()
    _Pair.apply(x.detach(), 2, weight).sum().backward()
    assert ASKED == [[False, True]]


def routed(function):
    def run(x, gate_up, down):
        generator = torch.Generator().manual_seed(3)
        index = torch.rand(len(x), 5, generator=generator).topk(2).indices
        return function(x, index, torch.rand(len(x), 2, generator=generator), gate_up, down)

    return run


def head(x, weight):
    return cross_entropy.linear_cross_entropy(x, weight, torch.arange(len(x)) % len(weight))


CASES = {
    "experts": (routed(experts.routed_experts), [(9, 8), (5, 6, 8), (5, 8, 3)]),
    "FP8 experts": (routed(fp8_experts.fp8_experts), [(9, 8), (5, 6, 8), (5, 8, 3)]),
    "FP8 linear": (fp8_linear.fp8_linear, [(9, 8), (6, 8)]),
    "head": (head, [(9, 8), (11, 8)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", [True, False])
def test_gradients_asked_for_in_two_halves_are_those_asked_for_at_once(name, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(experts.native, "usable", lambda *_: False)
    function, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = function(*inputs).square().sum()
    first = torch.autograd.grad(out, inputs[:1], retain_graph=True)
    later = torch.autograd.grad(out, inputs[1:], retain_graph=True)
    for half, whole in zip((*first, *later), torch.autograd.grad(out, inputs), strict=True):
        assert torch.equal(half, whole)


def test_the_half_that_is_not_asked_for_is_not_computed(monkeypatch):
    products = []
    real = fp8_linear.product
    monkeypatch.setattr(fp8_linear, "product", lambda *args: products.append(args) or real(*args))
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    out = fp8_linear.fp8_linear(x, weight).sum()
    counts = []
    for asked in ([x], [weight], [x, weight]):
        products.clear()
        torch.autograd.grad(out, asked, retain_graph=True)
        counts.append(len(products))
    assert counts == [1, 1, 2]
