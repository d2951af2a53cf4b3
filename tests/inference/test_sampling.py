import math

import pytest
import torch

from benthic.errors import WorkFailed
from benthic.inference.sampling import distribution, draw


def slow_distribution(logits, temperature, top_k, top_p):
    """The same by sorting a list of (logit, id) pairs."""
    ordered = sorted(enumerate(logits), key=lambda pair: -pair[1])
    if top_k:
        ordered = ordered[:top_k]
    weights = [(i, math.exp((logit - ordered[0][1]) / temperature)) for i, logit in ordered]
    total = sum(weight for _, weight in weights)
    kept, mass = [], 0.0
    for i, weight in weights:
        if mass >= top_p:
            break
        kept.append((i, weight / total))
        mass += weight / total
    probabilities = [0.0] * len(logits)
    for i, probability in kept:
        probabilities[i] = probability / mass
    return probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.5, 7, 0.8), (2.0, 1, 0.3), (1.0, 999, 0.01)],
)
def test_distribution_agrees_with_a_sorted_list(temperature, top_k, top_p):
    for seed in range(5):
        logits = torch.randn(23, generator=torch.Generator().manual_seed(seed)) * 3
        found = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        expected = torch.tensor(slow_distribution(logits.tolist(), temperature, top_k, top_p))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_temperature_zero_is_greedy_and_leaves_the_generator():
    logits = torch.tensor([0.1, 3.0, 2.9])
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert draw(logits, generator, temperature=0.0, top_k=2, top_p=0.5) == 1
    assert torch.equal(generator.get_state(), before)
    assert distribution(logits, temperature=0.0).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    found = distribution(torch.tensor([50.0, -80.0, 49.0]), temperature=temperature)
    assert found.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_in_one_line(temperature, value):
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(WorkFailed, match="not finite"):
        draw(logits, torch.Generator(), temperature=temperature)


def test_a_logit_of_minus_infinity_is_never_drawn():
    logits, generator = torch.tensor([0.0, -math.inf]), torch.Generator().manual_seed(0)
    assert {draw(logits, generator, temperature=2.0) for _ in range(50)} == {0}


def test_draws_follow_the_distribution():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    settings = {"temperature": 0.9, "top_k": 9, "top_p": 0.9}
    expected = distribution(logits, **settings)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    counts = torch.bincount(torch.tensor([draw(logits, generator, **settings) for _ in range(draws)]), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    degrees = int(kept.sum()) - 1
    assert degrees > 3
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_the_same_seed_draws_the_same():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))

    def sequence(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw(logits, generator, temperature=1.0) for _ in range(40)]

    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)
