"""Where a model is cut into pipeline stages: so that the slowest stage is as fast as can be.

Embedding and head count too. The head of a large vocabulary costs as much as layers do, and each MTP module costs a
layer and the head once more, all in the last stage; so that has fewer layers than the others.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.plan.flops import forward_flops


class Costs(NamedTuple):
    """Of a token, in any unit."""

    layers: list[float]
    first: float
    """Of the embedding."""
    last: float
    """Of final norm, head, and the MTP modules that run."""


def computed_costs(config: ModelConfig, length: int, *, mtp: bool) -> Costs:
    """Operations of the forward pass; of the backward pass they are twice as many everywhere."""

    def whole(layers: int, dense: int) -> float:
        sizes = {"num_hidden_layers": layers, "first_k_dense_replace": dense}
        return forward_flops(config.model_copy(update=sizes), length)

    head = whole(0, 0)
    dense, sparse = whole(1, 1) - head, whole(1, 0) - head
    further = forward_flops(config, length, mtp=mtp) - forward_flops(config, length)
    layers = [dense if layer < config.first_k_dense_replace else sparse for layer in range(config.num_hidden_layers)]
    return Costs(layers, 0.0, head + further)


def cut(costs: Costs, stages: int) -> list[range]:
    """The layers of each stage: those by which the dearest stage is cheapest, and the rest as even as they can be.

    The first stage may be the embedding alone, the last the head; those between have a layer each at least. Raises
    InputError if there are too few layers for that.
    """
    count = len(costs.layers)
    if stages > count + 2:
        raise InputError(f"{stages} pipeline stages: a model of {count} layers can be cut into {count + 2} at most")
    best = _divide(costs, stages, None)
    limit = max(_cost(costs, layers, stage, stages) for stage, layers in enumerate(best))
    return _divide(costs, stages, limit)


def cut_in_v(costs: Costs, stages: int) -> list[range]:
    """The same for V-shaped schedules, where the first rank also has the last stage, the second the last but one.

    Of some cuts with a lighter first stage, the one whose dearest rank is cheapest. Raises as :func:`cut`.
    """
    parts = (0.0, 0.25, 0.5, 0.75, 1.0)
    cuts = [cut(costs._replace(first=costs.first + part * costs.last), stages) for part in parts]
    return min(cuts, key=lambda layers: _of_ranks(costs, layers))


def _of_ranks(costs: Costs, layers: list[range]) -> tuple[float, float]:
    """Of the dearest rank in a V, and how uneven they are."""
    stages = [_cost(costs, held, stage, len(layers)) for stage, held in enumerate(layers)]
    ranks = [stages[place] + stages[-1 - place] for place in range(len(stages) // 2)]
    return max(ranks), sum(cost**2 for cost in ranks)


def stages_of(counts: Sequence[int]) -> list[range]:
    """The layers of stages that have so many."""
    ends = [0, *accumulate(counts)]
    return [range(start, end) for start, end in pairwise(ends)]


def dearest_over_mean(costs: Costs, stages: list[range], ranks: Sequence[int]) -> float:
    """Cost of the dearest rank over that of an average one, 1 being even; ``ranks`` are those of the stages."""
    of_ranks = dict.fromkeys(ranks, 0.0)
    for stage, layers in enumerate(stages):
        of_ranks[ranks[stage]] += _cost(costs, layers, stage, len(stages))
    return max(of_ranks.values()) * len(of_ranks) / sum(of_ranks.values())


def _cost(costs: Costs, layers: range, stage: int, stages: int) -> float:
    extra = (costs.first if stage == 0 else 0.0) + (costs.last if stage == stages - 1 else 0.0)
    return sum(costs.layers[layer] for layer in layers) + extra


def _divide(costs: Costs, stages: int, limit: float | None) -> list[range]:
    """Least maximum over stages; or, with a limit that none may exceed, least sum of squares."""
    count = len(costs.layers)
    found: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for stage in range(stages):
        may_be_empty = stage in (0, stages - 1)
        after: dict[int, tuple[float, list[int]]] = {}
        for start, (badness, ends) in found.items():
            for end in range(start + (not may_be_empty), count + 1):
                cost = _cost(costs, range(start, end), stage, stages)
                if limit is not None and cost > limit:
                    break
                total = max(badness, cost) if limit is None else badness + cost**2
                if end not in after or total < after[end][0]:
                    after[end] = total, [*ends, end]
        found = after
    return [range(start, end) for start, end in pairwise(found[count][1])]
