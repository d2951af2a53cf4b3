"""Spikes stand out of noise and of steady courses; a remembered course is judged the same after it was saved."""

import json
import math
import random

import numpy as np
import pytest

from benthic.errors import InputError
from benthic.train.health import FEWEST, LOSS_SPREAD, WINDOW, Health, Incident, Trouble, is_spike


@pytest.mark.parametrize("seed", range(5))
def test_a_value_is_a_spike_from_so_many_robust_deviations_on(seed):
    rng = np.random.default_rng(seed)
    before = rng.lognormal(1.0, 0.5, int(rng.integers(FEWEST, 100)))
    logarithms = np.log(before)
    deviation = 1.4826 * np.median(np.abs(logarithms - np.median(logarithms)))
    edge = np.exp(np.median(logarithms) + 6 * deviation)
    assert not is_spike(float(edge * 0.999), before.tolist(), 6, 0.01)
    assert is_spike(float(edge * 1.001), before.tolist(), 6, 0.01)
    assert not is_spike(float(edge * 1.001), before.tolist(), 6, 2.0)


@pytest.mark.parametrize("seed", range(3))
def test_noise_falling_losses_and_growing_gradients_are_no_spikes(seed):
    rng, health = random.Random(seed), Health("keep", 10.0)
    for step in range(2000):
        loss = 2.0 + 6.0 * math.exp(-step / 300) + rng.gauss(0, 0.15)
        grad_norm = (0.3 + step / 1000) * math.exp(rng.gauss(0, 0.35)) * (5.0 if step % 50 == 49 else 1.0)
        assert health.trouble([loss, 9.0, 1.0], grad_norm) is None, step
        health.remember(loss, grad_norm, updated=True)
    assert health.trouble([3 * loss], grad_norm) is Trouble.LOSS_SPIKE
    assert health.trouble([loss], 50 * grad_norm) is Trouble.GRADIENT_SPIKE


def test_a_few_spikes_hide_no_others_and_a_new_level_is_accepted():
    before = [1.0 + 0.01 * (i % 5) for i in range(WINDOW)]
    before[-9:] = [50.0] * 9
    assert is_spike(2.0, before, 10, LOSS_SPREAD)
    health = Health("keep", 10.0)
    found = []
    for value in before[:30] + [2.0] * WINDOW:
        found.append(health.trouble([value], 1.0))
        health.remember(value, 1.0, updated=True)
    assert found[30] is Trouble.LOSS_SPIKE
    assert found[-1] is None


def test_nothing_to_compare_with_makes_no_spike():
    assert not is_spike(1e9, [1.0] * (FEWEST - 1), 10, LOSS_SPREAD)
    assert is_spike(1e9, [1.0] * FEWEST, 10, LOSS_SPREAD)
    assert not is_spike(1.22, [1.0] * FEWEST, 10, LOSS_SPREAD)  # exp(0.2) is 1.221
    assert is_spike(1.23, [1.0] * FEWEST, 10, LOSS_SPREAD)
    assert not is_spike(0.0, [0.0] * FEWEST, 10, LOSS_SPREAD)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told_from_the_first_step_on(bad):
    health = Health()
    assert health.trouble([1.0, bad], 1.0) is Trouble.LOSS_NOT_FINITE
    assert health.trouble([1.0, 1.0], bad) is Trouble.GRADIENT_NOT_FINITE
    health.remember(bad, 1.0, updated=False)
    health.remember(1.0, bad, updated=False)
    assert health.to_json() == {"losses": [], "grad_norms": [], "skipped": 2}


@pytest.mark.parametrize("policy", ["keep", "skip", "roll_back"])
@pytest.mark.parametrize("again", [None, *Trouble])
def test_which_steps_are_taken(policy, again):
    taken = Health(policy).may_update(Incident(Trouble.LOSS_SPIKE, 1.0, 1.0, again))
    assert taken == (again is None or (policy == "keep" and again in (Trouble.LOSS_SPIKE, Trouble.GRADIENT_SPIKE)))


def test_a_saved_memory_judges_as_the_one_it_was_saved_from():
    rng, health, twin = random.Random(0), Health("skip", 3.0), Health("skip", 3.0)
    for step in range(100):
        health.remember(rng.gauss(3, 1), rng.gauss(1, 0.3), updated=step < 98)
    twin.restore(json.loads(json.dumps(health.to_json())), "here")
    assert twin.skipped == health.skipped == 2
    for _ in range(200):
        loss, grad_norm = rng.gauss(3, 2), rng.gauss(1, 0.6)
        assert health.trouble([loss], grad_norm) is twin.trouble([loss], grad_norm)
        for each in (health, twin):
            each.remember(loss, grad_norm, updated=True)
    assert twin.to_json() == health.to_json()


@pytest.mark.parametrize(
    "saved",
    [None, [], {}, {"losses": [], "grad_norms": []}, {"losses": ["1"], "grad_norms": [], "skipped": 0},
     {"losses": [], "grad_norms": None, "skipped": 0}, {"losses": [], "grad_norms": [], "skipped": 0.5}],
)  # fmt: skip
def test_a_memory_that_is_none_is_refused(saved):
    with pytest.raises(InputError, match="here: health="):
        Health().restore(saved, "here")
