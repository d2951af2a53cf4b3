import random

import pytest

from benthic.inference.pace import Acceptance, Line, Pace


def simulated(pace, *, fixed, per_row, draft, rates, steps=600, batch=1, seed=0):
    """Drafts a step and tokens a second when decoding, drafting and acceptance are as given; last half of the steps."""
    rng = random.Random(seed)
    requests = []
    while len(requests) < batch:
        requests += filter(None, [pace.new_request()])
    drafts = tokens = seconds = 0.0
    for step in range(steps):
        depths = pace.depths([(acceptance, pace.max_depth) for acceptance in requests], batch)
        rows, passes = batch + sum(depths), max(depths)
        noise = rng.uniform(0.8, 1.25)
        decode_s, draft_s = (fixed + per_row * rows) * noise, draft * passes * noise
        pace.decoding.add(rows, decode_s)
        if passes:
            pace.drafting.add(sum(depths) / passes, draft_s / passes)
        for acceptance, depth in zip(requests, depths, strict=True):
            accepted = 0
            while accepted < depth and rng.random() < rates[accepted]:
                accepted += 1
            if acceptance and depth:
                pace.learn(acceptance, depth, accepted)
            if step >= steps // 2:
                tokens += 1 + accepted
        if step >= steps // 2:
            drafts += sum(depths) / batch
            seconds += decode_s + draft_s
    return drafts / (steps - steps // 2), tokens / seconds


def best_fixed_rate(*, fixed, per_row, draft, rates):
    """Tokens a second of the best constant depth, by arithmetic."""
    outcomes = []
    for depth in range(len(rates) + 1):
        expected, chance = 1.0, 1.0
        for rate in rates[:depth]:
            chance *= rate
            expected += chance
        outcomes.append(expected / (fixed + per_row * (depth + 1) + draft * depth))
    return max(outcomes)


@pytest.mark.parametrize(
    ("costs", "rates"),
    [
        ({"fixed": 10, "per_row": 0.5, "draft": 0.5}, [0.9, 0.85, 0.8]),
        ({"fixed": 10, "per_row": 1.0, "draft": 1.0}, [0.8, 0.3, 0.1]),
        ({"fixed": 10, "per_row": 1.0, "draft": 1.0}, [0.05, 0.05, 0.05]),
        ({"fixed": 0, "per_row": 10.0, "draft": 2.0}, [0.9, 0.9, 0.9]),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_comes_near_the_best_constant_depth(costs, rates, seed):
    _, rate = simulated(Pace(3), **costs, rates=rates, seed=seed, steps=2000)
    assert rate > 0.9 * best_fixed_rate(**costs, rates=rates)


def test_switches_off_where_each_row_costs_as_much_as_the_first():
    drafts, _ = simulated(Pace(3), fixed=0.0, per_row=1.0, draft=0.3, rates=[0.95] * 3)
    assert drafts < 0.05


def test_a_large_batch_bound_by_arithmetic_gets_no_drafts():
    costs = {"fixed": 4.0, "per_row": 1.0, "draft": 0.2, "rates": [0.7, 0.6, 0.5]}
    alone, _ = simulated(Pace(3), **costs)
    crowded, _ = simulated(Pace(3), **costs, batch=32)
    assert alone > 1.0
    assert crowded < 0.2


def test_comes_back_when_it_pays_again():
    pace = Pace(3)
    simulated(pace, fixed=10, per_row=1, draft=1, rates=[0.0] * 3)
    drafts, _ = simulated(pace, fixed=10, per_row=1, draft=1, rates=[0.9] * 3, steps=4000)
    assert drafts > 1.5


def test_new_requests_do_without_after_many_vain_trials_but_some_still_try():
    pace = Pace(2)
    simulated(pace, fixed=1, per_row=10, draft=1, rates=[0.0] * 2, steps=3000)
    wanted = [pace.new_request() is not None for _ in range(64)]
    assert 0 < sum(wanted) <= 16


def test_never_beyond_what_is_of_use():
    pace, rng = Pace(3), random.Random(0)
    for _ in range(200):
        caps = [rng.randrange(4) for _ in range(5)]
        acceptances = [rng.choice([None, Acceptance([0.9] * 3)]) for _ in caps]
        depths = pace.depths(list(zip(acceptances, caps, strict=True)), 5)
        assert all(0 <= d <= cap and (a or d == 0) for d, cap, a in zip(depths, caps, acceptances, strict=True))


def test_no_modules_no_drafts():
    pace = Pace(0)
    assert pace.new_request() is None
    assert pace.depths([(None, 0), (None, 0)], 2) == [0, 0]


def test_a_line_is_fitted_and_an_outlier_forgotten():
    line, rng = Line(), random.Random(0)
    for _ in range(500):
        rows = rng.randint(1, 8)
        line.add(rows, 3.0 + 0.5 * rows)
    assert line.fit() == pytest.approx((3.0, 0.5))
    line.add(4, 1e6)
    assert sum(line.fit()) < 10
    for _ in range(300):
        rows = rng.randint(1, 8)
        line.add(rows, 3.0 + 0.5 * rows)
    assert line.fit() == pytest.approx((3.0, 0.5), rel=0.01)


def test_a_draft_after_a_wrong_one_teaches_nothing():
    acceptance = Acceptance([0.5, 0.5, 0.5])
    acceptance.learn(3, 1)
    assert acceptance.rates[0] > 0.5 > acceptance.rates[1]
    assert acceptance.rates[2] == 0.5


def test_an_engine_whose_first_moments_were_slow_drafts_as_one_whose_were_not():
    """The first call makes room and starts threads: what it took says nothing of the next."""
    pace = Pace(3)
    pace.decoding.add(4, 0.05)
    pace.drafting.add(1, 0.05)
    case = {"fixed": 0.4e-3, "per_row": 0.05e-3, "draft": 0.06e-3, "rates": [0.75, 0.67, 0.6]}
    drafts, _ = simulated(pace, **case, steps=100)
    assert drafts > 1
