"""Linear layers and experts in FP8 against their three products written out with the slow reference."""

import pytest
import torch

from benthic.ops.experts import routed_experts_reference, swiglu_backward
from benthic.ops.swiglu import swiglu
from benthic.precision.blocks import COLUMN_TILE, ROW_TILE, SQUARE
from benthic.precision.fp8_experts import fp8_experts, fp8_swiglu
from benthic.precision.fp8_linear import fp8_linear

SEEDS = [0, 1, 2]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("shape", [(130, 140, 129), (1, 7, 3), (260, 128, 40)])
@pytest.mark.parametrize("seed", SEEDS)
def test_linear_is_its_three_products_bit_for_bit(slow, shape, powers_of_two, seed):
    torch.manual_seed(seed)
    tokens, width, out_width = shape
    x = (torch.randn(tokens, width) * torch.randn(width).exp()).requires_grad_()
    weight = torch.randn(out_width, width, requires_grad=True)
    dout = torch.randn(tokens, out_width) * 1e-4
    out = fp8_linear(x, weight, powers_of_two=powers_of_two)
    out.backward(dout)
    x8, w8 = slow.quantise(x.detach().numpy(), ROW_TILE, powers_of_two), slow.quantise(weight.detach().numpy(), SQUARE)
    assert torch.equal(out, slow.product(x8, w8))
    assert torch.equal(x.grad, slow.product(slow.quantise(dout.numpy(), ROW_TILE), slow.transposed(w8)))
    columns = slow.transposed(slow.requantise(*x8, COLUMN_TILE, powers_of_two))
    dout_columns = slow.transposed(slow.quantise(dout.numpy(), COLUMN_TILE))
    assert torch.equal(weight.grad, slow.product(dout_columns, columns))


def test_backward_reads_only_the_fp8_copy_of_the_input():
    def weight_gradient(spoil: bool):
        torch.manual_seed(0)
        x, weight = torch.randn(6, 5, 70), torch.randn(20, 70, requires_grad=True)
        out = fp8_linear(x, weight)
        if spoil:
            x.fill_(torch.nan)
        out.square().sum().backward()
        return weight.grad

    assert torch.equal(weight_gradient(spoil=False), weight_gradient(spoil=True))


def routing(tokens, experts, chosen, seed):
    """Experts and gates of tokens; the last expert gets none."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts - 1, generator=generator)[:chosen] for _ in range(tokens)])
    return index, torch.rand(tokens, chosen, generator=generator) + 0.1


def experts_case(seed, tokens=70, experts=5, chosen=2, width=136, hidden=36):
    torch.manual_seed(seed)
    index, gate = routing(tokens, experts, chosen, seed)
    x, dout = torch.randn(tokens, width), torch.randn(tokens, width)
    weights = torch.randn(experts, 2 * hidden, width) / width**0.5, torch.randn(experts, width, hidden) / hidden**0.5
    return x, index, gate, *weights, dout


def slow_experts(slow, x, index, gate, gate_up, down, dout):
    """Output and the gradients of x, gate, gate_up and down, an expert at a time."""
    out, dx = torch.zeros_like(x), torch.zeros_like(x)
    dgate, dgate_up, ddown = torch.zeros_like(gate), torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert in range(len(down)):
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        up8, down8 = (slow.quantise(w[expert].numpy(), SQUARE) for w in (gate_up, down))
        x8, dy8 = (slow.quantise(t[tokens].numpy(), ROW_TILE, True) for t in (x, dout))
        weight = gate[tokens, slots, None]
        gated = slow.product(x8, up8)
        hidden = swiglu(gated) * weight
        out[tokens] += slow.product(slow.quantise(hidden.numpy(), ROW_TILE), down8)
        kept8 = slow.quantise(gated.numpy(), ROW_TILE)
        kept = torch.from_numpy((kept8[0] * kept8[1]).astype("float32"))
        dhidden = slow.product(dy8, slow.transposed(down8))
        hidden, dgated, dgate[tokens, slots] = swiglu_backward(kept, weight, dhidden)
        dx[tokens] += slow.product(slow.quantise(dgated.numpy(), ROW_TILE), slow.transposed(up8))
        x_columns, dy_columns = (slow.transposed(slow.requantise(*t, COLUMN_TILE, True)) for t in (x8, dy8))
        dgate_up[expert] = slow.product(slow.transposed(slow.quantise(dgated.numpy(), COLUMN_TILE)), x_columns)
        ddown[expert] = slow.product(dy_columns, slow.transposed(slow.quantise(hidden.numpy(), COLUMN_TILE)))
    return out, dx, dgate, dgate_up, ddown


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_are_their_six_products(slow, seed):
    x, index, gate, gate_up, down, dout = experts_case(seed)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, gate_up, down)]
    out = fp8_experts(leaves[0], index, *leaves[1:])
    out.backward(dout)
    expected = slow_experts(slow, x, index, gate, gate_up, down, dout)
    # A token's experts are added in another order; everything else is the same arithmetic.
    for found, wanted in zip((out, leaves[0].grad), expected, strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for leaf, wanted in zip(leaves[1:], expected[2:], strict=True):
        assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_are_near_those_in_fp32(seed):
    x, index, gate, gate_up, down, dout = experts_case(seed, tokens=300)
    results = []
    for function in (fp8_experts, routed_experts_reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, gate_up, down)]
        out = function(leaves[0], index, *leaves[1:])
        out.backward(dout)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert 1e-3 < relative(found, expected) < 0.1


def test_a_shared_expert_is_one_that_every_token_chooses():
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(2, 5, 30), torch.randn(24, 30), torch.randn(30, 12)
    out = fp8_swiglu(x, gate_up, down)
    assert out.shape == x.shape
    assert relative(out, swiglu(x @ gate_up.T) @ down.T) < 0.1
    every = fp8_experts(x.flatten(0, 1), torch.zeros(10, 1).long(), torch.ones(10, 1), gate_up[None], down[None])
    assert torch.equal(out.flatten(0, 1), every)
