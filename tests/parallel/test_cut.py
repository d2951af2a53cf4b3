"""Where models are cut: complete, in order, and no cut has a cheaper dearest stage."""

import itertools
import random

import pytest

from benthic.config.presets import PRESETS
from benthic.errors import InputError
from benthic.parallel.cut import Costs, computed_costs, cut, cut_in_v
from benthic.plan.flops import forward_flops


def dearest(costs, layers):
    sums = [sum(costs.layers[layer] for layer in part) for part in layers]
    sums[0] += costs.first
    sums[-1] += costs.last
    return max(sums), sum(cost**2 for cost in sums)


def all_cuts(count, stages):
    for ends in itertools.combinations_with_replacement(range(count + 1), stages - 1):
        parts = [range(start, end) for start, end in itertools.pairwise((0, *ends, count))]
        if all(parts[1:-1]):
            yield parts


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_is_better(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    stages = rng.randint(2, min(count + 2, 5))
    costs = Costs([rng.choice([1.0, 2.0, 5.0]) for _ in range(count)], rng.random(), 3 * rng.random())
    found = cut(costs, stages)
    assert found in list(all_cuts(count, stages))
    assert dearest(costs, found) == pytest.approx(min(dearest(costs, other) for other in all_cuts(count, stages)))


def test_the_last_stage_has_fewer_layers_for_its_head_and_mtp():
    costs = computed_costs(PRESETS["v3-671b"], 4096, mtp=True)
    layers = cut(costs, 16)
    assert [len(part) for part in layers] == sorted((len(part) for part in layers), reverse=True)
    assert len(layers[-1]) < 61 / 16 - 1
    assert sum(map(len, layers)) == 61


@pytest.mark.parametrize("preset", ["tiny", "bench-108m", "v3-671b"])
@pytest.mark.parametrize("mtp", [False, True])
def test_costs_add_up_to_the_model(preset, mtp):
    config = PRESETS[preset]
    costs = computed_costs(config, 100, mtp=mtp)
    whole = forward_flops(config, 100, mtp=mtp)
    assert sum(costs.layers) + costs.first + costs.last == pytest.approx(whole)


def test_too_many_stages_are_refused():
    with pytest.raises(InputError, match="9 pipeline stages: a model of 3 layers can be cut into 5 at most"):
        cut(computed_costs(PRESETS["tiny"], 16, mtp=True), 9)


def test_a_v_is_cut_so_that_its_first_rank_has_no_more_than_others():
    costs = computed_costs(PRESETS["v3-671b"], 4096, mtp=True)

    def ranks(layers):
        stages = [sum(costs.layers[layer] for layer in part) for part in layers]
        stages[-1] += costs.last
        return [stages[place] + stages[-1 - place] for place in range(len(stages) // 2)]

    straight, bent = ranks(cut(costs, 32)), ranks(cut_in_v(costs, 32))
    assert sum(straight) == pytest.approx(sum(bent))
    assert max(bent) < 0.9 * max(straight)


@pytest.mark.parametrize("seed", range(10))
def test_a_cut_in_v_is_whole_and_in_order(seed):
    rng = random.Random(seed)
    costs = Costs([rng.random() for _ in range(rng.randint(4, 12))], rng.random(), 3 * rng.random())
    assert list(itertools.chain(*cut_in_v(costs, 4))) == list(range(len(costs.layers)))
