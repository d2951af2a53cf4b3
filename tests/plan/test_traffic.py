"""Where tokens go, counted one by one; and what goes round in a ring, message by message."""

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.ops.routing import select_experts
from benthic.plan.traffic import gathered, summed, token_messages, visits

TINY = PRESETS["tiny"]


def counted(config, ranks, per_node, seed=5, tokens=6000):
    """The same, token by token, of other random tokens."""
    score = torch.rand(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(seed))
    none = torch.zeros(config.n_routed_experts)
    sizes = {"n_group": config.n_group, "topk_group": config.topk_group, "top_k": config.num_experts_per_tok}
    sums = [0] * 5
    for token, chosen in enumerate(select_experts(score, none, **sizes).tolist()):
        own = token % ranks
        homes = [expert * ranks // config.n_routed_experts for expert in chosen]
        away = [home for home in homes if home != own]
        afar = [home for home in homes if home // per_node != own // per_node]
        found = len(set(away)), len(away), len(set(afar)), len(afar), len({home // per_node for home in homes})
        sums = [total + number for total, number in zip(sums, found, strict=True)]
    return [total / tokens for total in sums]


@pytest.mark.parametrize(
    ("config", "ranks", "per_node"),
    [
        (TINY, 2, 8),
        (TINY, 4, 2),
        (TINY, 8, 4),
        (TINY.model_copy(update={"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}), 4, 2),
        (PRESETS["bench-108m"], 8, 8),
        (PRESETS["v3-671b"], 64, 8),
    ],
)
def test_visits_are_those_of_tokens_one_by_one(config, ranks, per_node):
    assert tuple(visits(config, ranks, per_node)) == pytest.approx(counted(config, ranks, per_node), rel=0.03, abs=0.01)


def test_a_token_visits_as_many_nodes_as_routing_allows():
    """DeepSeek-V3: at most four nodes, one of its eight groups of experts each (V3 report section 2.1.2)."""
    config = PRESETS["v3-671b"]
    assert 3.5 < visits(config, 64, 8).nodes <= 4
    free = config.model_copy(update={"n_group": 1, "topk_group": 1})
    assert visits(free, 64, 8).nodes > 5
    # One message serves several experts on the same rank.
    seen = visits(config, 64, 8)
    assert seen.messages < seen.pairs < 8
    assert visits(config, 8, 8).messages_afar == 0


def sent_in_a_ring(parts: list[float], rounds: int) -> list[float]:
    """Bytes of each rank: in every round it sends on one part, which is another rank's each time."""
    ranks = len(parts)
    return [sum(parts[(rank - turn) % ranks] for turn in range(rounds)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rings(ranks):
    size = 240.0
    parts = [size / ranks] * ranks
    assert sent_in_a_ring(parts, ranks - 1) == pytest.approx([gathered(size, ranks)] * ranks)
    assert sent_in_a_ring(parts, 2 * (ranks - 1)) == pytest.approx([summed(size, ranks)] * ranks)


def test_a_token_goes_there_and_back_forward_and_backward():
    sent = token_messages(messages=1.5, pairs=2.0, row=400, dispatched_row=100)
    # Forward: 1.5 rows and 2 weights out, 1.5 rows back; backward: gradients the other way round.
    assert sent.dispatch == 1.5 * 100 + 2 * 4 + 1.5 * 100
    assert sent.combine == 1.5 * 400 + 1.5 * 400 + 2 * 4
    assert sent.counts == 2 * 16
