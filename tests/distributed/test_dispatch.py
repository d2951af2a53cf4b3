"""Experts divided among ranks compute what whole ones do, and no more is sent than must be."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from spread import MODEL

from benthic.config.schema import ModelConfig
from benthic.model.moe import MoE
from benthic.parallel.dispatch import Sender, plan_dispatch
from benthic.parallel.experts import divide_experts
from benthic.parallel.traffic import Traffic
from benthic.parallel.turns import Turns
from benthic.train.compute import fp8_products


def moe(seed, **changes):
    """A layer in float64, the same on every rank."""
    config = ModelConfig.model_validate(MODEL | changes)
    layer = MoE(config).double()
    layer.router.bias = layer.router.bias.float()
    generator = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        weight.data.normal_(0, 0.3, generator=generator)
    return layer


def outcome(layer, x_BTD):
    """Output, and gradients of tokens, router and experts."""
    x_BTD = x_BTD.clone().requires_grad_()
    out_BTD, routing = layer(x_BTD)
    (out_BTD.square().sum() + routing.balance_loss).backward()
    return {
        "out": out_BTD.detach(), "x": x_BTD.grad, "router": layer.router.weight.grad,
        "gate_up": layer.experts.gate_up.grad, "down": layer.experts.down.grad,
    }  # fmt: skip


def rows_of(seed, ranks, lengths):
    """Each rank's tokens: of several lengths, one of them maybe none."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, MODEL["hidden_size"], generator=generator).double() for length in lengths][:ranks]


def divided(rank, seed, lengths, changes, fp8):
    """What a rank computes, and what it sends."""
    layer, traffic = moe(seed, **changes), Traffic()
    divide_experts(layer, Sender(dist.group.WORLD, traffic, Turns()), fp8=fp8)
    x_BTD = rows_of(seed, dist.get_world_size(), lengths)[rank]
    if not fp8:
        return outcome(layer, x_BTD), traffic.take()
    with fp8_products(layer):
        return outcome(layer, x_BTD), traffic.take()


def whole(seed, lengths, changes, ranks, fp8=False):
    """The same on one process, a rank's tokens after another's; gradients of weights are summed."""
    layer, found = moe(seed, **changes), []
    for x_BTD in rows_of(seed, ranks, lengths):
        if fp8:
            with fp8_products(layer):
                found.append(outcome(layer, x_BTD))
        else:
            found.append(outcome(layer, x_BTD))
    return found


CASES = [
    (0, 2, (5, 9), {}),
    (1, 4, (7, 1, 30, 4), {"num_experts_per_tok": 1, "n_group": 8, "topk_group": 1}),
    (2, 4, (3, 3, 3, 3), {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}),
]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("seed", "ranks", "lengths", "changes"), CASES)
def test_divided_experts_compute_what_whole_ones_do(seed, ranks, lengths, changes, fp8):
    expected = whole(seed, lengths, changes, ranks, fp8)
    found = run_processes(divided, ranks, seed, lengths, changes, fp8)
    size = MODEL["n_routed_experts"] // ranks
    for rank, (got, _) in enumerate(found):
        for name in ("out", "x"):
            torch.testing.assert_close(got[name], expected[rank][name], atol=1e-12, rtol=1e-12)
        for name in ("gate_up", "down"):
            own = expected[-1][name][rank * size : (rank + 1) * size]
            torch.testing.assert_close(got[name], own, atol=1e-12, rtol=1e-12)
    total = sum(got["router"] for got, _ in found)
    torch.testing.assert_close(total, expected[-1]["router"], atol=1e-12, rtol=1e-12)


def test_a_token_goes_once_to_each_rank_it_visits():
    seed, ranks, lengths, changes = 3, 4, (6, 6, 6, 6), {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}
    layer = moe(seed, **changes)
    found = run_processes(divided, ranks, seed, lengths, changes, False)
    eighths = run_processes(divided, ranks, seed, lengths, changes, True)
    for rank, (x_BTD, (_, sent), (_, sent_in_fp8)) in enumerate(
        zip(rows_of(seed, ranks, lengths), found, eighths, strict=True)
    ):
        index_NK = layer(x_BTD)[1].index.flatten(0, 1)
        experts = MODEL["n_routed_experts"] // ranks
        abroad = [[int(e) // experts for e in row if int(e) // experts != rank] for row in index_NK]
        messages, pairs = sum(len(set(row)) for row in abroad), sum(len(row) for row in abroad)
        # Gates are fp64 here. What comes back in the backward pass for others' tokens is counted there.
        others = [r for r in range(ranks) if r != rank]
        asked = [layer(rows_of(seed, ranks, lengths)[other])[1].index.flatten(0, 1) // experts for other in others]
        answered = sum(int((index == rank).any(1).sum()) for index in asked)
        answered_pairs = sum(int((index == rank).sum()) for index in asked)
        width = MODEL["hidden_size"] * 8
        assert sent["dispatch"] == 2 * messages * width + pairs * 8
        assert sent["combine"] == 2 * answered * width + answered_pairs * 8
        assert sent_in_fp8["dispatch"] == 2 * messages * (MODEL["hidden_size"] + 4) + pairs * 8


def nodes_visited(index_NK, experts, nodes):
    """How many nodes each token goes to (N,), where experts lie in order on so many."""
    node_NK = index_NK // (experts // nodes)
    return torch.zeros(len(index_NK), nodes, dtype=torch.bool).scatter_(1, node_NK, True).sum(1)


@pytest.mark.parametrize(("groups", "limit"), [(8, 4), (4, 2), (4, 1), (8, 8)])
def test_a_token_visits_at_most_as_many_nodes_as_groups_are_allowed(groups, limit):
    """The experts of a group lie on one node: so published, of eight groups at most four."""
    layer = moe(groups, n_routed_experts=16, n_group=groups, topk_group=limit, num_experts_per_tok=2 * limit)
    torch.manual_seed(limit)
    index_NK = layer(torch.randn(1, 500, MODEL["hidden_size"]).double())[1].index.flatten(0, 1)
    visited_N = nodes_visited(index_NK, 16, groups)
    assert visited_N.max() == limit
    unlimited = moe(groups, n_routed_experts=16, n_group=1, topk_group=1, num_experts_per_tok=2 * limit)
    free_NK = unlimited(torch.randn(1, 500, MODEL["hidden_size"]).double())[1].index.flatten(0, 1)
    assert limit == groups or nodes_visited(free_NK, 16, groups).max() > limit


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_sends_every_choice_once(seed):
    torch.manual_seed(seed)
    tokens, top_k, ranks, experts = 11, 3, 4, 3
    index_NK = torch.stack([torch.randperm(ranks * experts)[:top_k] for _ in range(tokens)])
    plan = plan_dispatch(index_NK, experts, ranks)
    assert plan.choice_P.sort().values.tolist() == list(range(tokens * top_k))
    rank_M = torch.arange(ranks).repeat_interleave(plan.messages_R)
    rank_P = torch.arange(ranks).repeat_interleave(plan.pairs_R)
    assert len(set(zip(rank_M.tolist(), plan.token_M.tolist(), strict=True))) == len(rank_M)
    first_R = plan.messages_R.cumsum(0) - plan.messages_R
    for rank, choice, expert, message in zip(
        rank_P.tolist(), plan.choice_P.tolist(), plan.expert_P.tolist(), plan.message_P.tolist(), strict=True
    ):
        assert index_NK.flatten()[choice] == rank * experts + expert
        assert plan.token_M[first_R[rank] + message] == choice // top_k
