"""Bytes that training on several devices sends, by formula: tokens to experts and back, states between stages, weights
and gradients.

Where tokens go depends on routers, which training keeps even. So the formulas ask the routers' own rule, on random
affinities that favour no expert.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from benthic.config.schema import ModelConfig
from benthic.ops.routing import select_experts

_GATE = 4
"""Bytes of the weight of an expert."""
_PAIR = 16
"""Bytes that say which expert a pair is for, and which message has its token."""
_TOKENS = 16384
"""Enough for a third figure."""


class Visits(NamedTuple):
    """Where a token is sent, on average over tokens of even routers."""

    messages: float
    """To other ranks that have experts it chose; once to each, however many these are."""
    pairs: float
    """Chosen experts on other ranks."""
    messages_afar: float
    """Of ``messages``, those to other nodes."""
    pairs_afar: float
    nodes: float
    """Visited, its own among them if it has a chosen expert: at most ``topk_group`` where a group is a node."""


@lru_cache(maxsize=64)
def visits(config: ModelConfig, ranks: int, ranks_per_node: int = 8) -> Visits:
    """Of a token whose experts are divided, in order, among ``ranks``, of which so many neighbours share a node."""
    generator = torch.Generator().manual_seed(0)
    score_NE = torch.rand(_TOKENS, config.n_routed_experts, generator=generator)
    index_NK = select_experts(
        score_NE,
        torch.zeros(config.n_routed_experts),
        n_group=config.n_group,
        topk_group=config.topk_group,
        top_k=config.num_experts_per_tok,
    )
    rank_NK = index_NK // (config.n_routed_experts // ranks)
    # Tokens are dealt to ranks in turn.
    own_N1 = torch.arange(_TOKENS).remainder(ranks)[:, None]
    away_NK, afar_NK = rank_NK != own_N1, rank_NK // ranks_per_node != own_N1 // ranks_per_node
    visits_NR = torch.zeros(_TOKENS, ranks, dtype=torch.bool).scatter_(1, rank_NK, True)
    rank_R = torch.arange(ranks)
    messages_afar = visits_NR & (rank_R // ranks_per_node != own_N1 // ranks_per_node)
    nodes = torch.zeros(_TOKENS, ranks, dtype=torch.bool).scatter_(1, rank_NK // ranks_per_node, True)
    sums = (visits_NR & (rank_R != own_N1), away_NK, messages_afar, afar_NK, nodes)
    return Visits(*(float(found.sum()) / _TOKENS for found in sums))


def gathered(size: float, ranks: int) -> float:
    """Bytes that one of ``ranks`` sends so that each has all ``size`` bytes, of which it had a share.

    As many are sent so that each has the sum of its share of what all have.
    """
    return size * (ranks - 1) / ranks


def summed(size: float, ranks: int) -> float:
    """Bytes that one of ``ranks`` sends so that each has the sum of all ``size`` bytes."""
    return 2 * gathered(size, ranks)


class TokenMessages(NamedTuple):
    """Bytes that one rank sends for one token and one MoE layer, forward and backward."""

    dispatch: float
    """Tokens and weights of their experts, and gradients of the experts' outputs."""
    combine: float
    """The experts' outputs, and gradients of tokens and weights."""
    counts: float
    """Which experts tokens are for."""


def token_messages(messages: float, pairs: float, row: float, dispatched_row: float) -> TokenMessages:
    """For so many messages to other ranks with so many pairs of token and expert in them, on average.

    Args:
        messages: see :class:`Visits`.
        pairs: likewise.
        row: bytes of a token's state as it comes back.
        dispatched_row: bytes of it as it goes out, which may be in FP8.
    """
    gates = pairs * _GATE
    return TokenMessages(2 * messages * dispatched_row + gates, 2 * messages * row + gates, pairs * _PAIR)
