import math

import numpy as np
import pytest
import torch

from benthic.errors import WorkFailed
from benthic.inference.request import Sampling
from benthic.inference.sampling import (
    Logits,
    Sampler,
    distribution,
    exponential_noise,
    log_probabilities,
    top_of,
    unpacked,
)


def slow_distribution(logits, settings):
    """The same by sorting a list of (logit, id) pairs."""
    ordered = sorted(enumerate(logits), key=lambda pair: -pair[1])
    if settings.top_k:
        ordered = ordered[: settings.top_k]
    weights = [(i, math.exp((logit - ordered[0][1]) / settings.temperature)) for i, logit in ordered]
    total = sum(weight for _, weight in weights)
    kept, mass = [], 0.0
    for i, weight in weights:
        if mass >= settings.top_p or weight < settings.min_p:
            break
        kept.append((i, weight / total))
        mass += weight / total
    probabilities = [0.0] * len(logits)
    for i, probability in kept:
        probabilities[i] = probability / mass
    return probabilities


def dense(logits, settings):
    tokens_K, probability_K = distribution(logits, settings)
    return torch.zeros(len(logits)).index_add(0, tokens_K, probability_K)


def chosen(logits, **settings):
    """What a fresh sampler chooses at each of many positions."""
    sampler = Sampler(Sampling(**{"top_p": 1.0, "temperature": 1.0} | settings), [0], len(logits))
    return [sampler.choose(Logits.of(logits), position) for position in range(2000)]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0},
        {"temperature": 1.3, "top_k": 5, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.5, "top_k": 7, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 1, "top_p": 0.3},
        {"temperature": 1.0, "top_k": 999, "top_p": 0.01},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_p": 0.99, "min_p": 1.0},
    ],
)
@pytest.mark.parametrize("size", [23, 3000])
def test_distribution_agrees_with_a_sorted_list(settings, size):
    for seed in range(4):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3
        found = dense(logits, Sampling(**settings))
        expected = torch.tensor(slow_distribution(logits.tolist(), Sampling(**settings)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_flat_distribution_is_cut_where_a_sorted_list_cuts_it():
    settings = Sampling(temperature=1.0, top_p=0.9)
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 0.1
    tokens_K, _ = distribution(logits, settings)
    assert abs(len(tokens_K) - sum(p > 0 for p in slow_distribution(logits.tolist(), settings))) <= 1
    assert len(tokens_K) > 2000


@pytest.mark.parametrize("temperature", [1e-30, 1e-45])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    found = dense(torch.tensor([50.0, -80.0, 49.0]), Sampling(temperature=temperature))
    assert found.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("settings", [{"temperature": 1e-50}, {"temperature": 1.0, "top_p": 1e-50}], ids=str)
def test_what_rounds_to_zero_takes_the_likeliest(settings):
    assert set(chosen(torch.tensor([0.1, 3.0, 2.9]), **settings)) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38])
@pytest.mark.parametrize("cut", [{}, {"top_p": 1.0}, {"top_k": 3}, {"min_p": 1.0}], ids=str)
def test_every_setting_gives_a_token_for_logits_of_any_size(temperature, scale, cut):
    logits = torch.tensor([0.5, -1.0, 1.0, 0.25]) * scale
    for penalty in (0.01, 10.0):
        bias = {0: 100.0, 1: -100.0}
        settings = Sampling(temperature=temperature, repetition_penalty=penalty, logit_bias=bias, seed=1, **cut)
        sampler = Sampler(settings, [0, 1, 2], 4)
        for position in range(20):
            token = sampler.choose(Logits.of(logits), position)
            assert sampler.guess(logits, position) == token
            sampler.accept(token)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_guess_from_logits_that_are_not_finite_is_some_token(value):
    for settings in (Sampling(seed=1), Sampling(temperature=0.0)):
        assert Sampler(settings, [0], 3).guess(torch.full((3,), value), 5) in range(3)


def test_temperature_zero_takes_the_likeliest():
    assert set(chosen(torch.tensor([0.1, 3.0, 2.9]), temperature=0.0)) == {1}
    assert dense(torch.tensor([0.1, 3.0, 2.9]), Sampling(temperature=0.0)).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_in_one_line(temperature, value):
    with pytest.raises(WorkFailed, match="not finite"):
        chosen(torch.tensor([0.0, value, 1.0]), temperature=temperature)


def test_a_logit_of_minus_infinity_is_never_drawn():
    assert set(chosen(torch.tensor([0.0, -math.inf, 0.0]), temperature=2.0, seed=0)) == {0, 2}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(settings):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = dense(logits, Sampling(**{"temperature": 1.0, "top_p": 1.0} | settings))
    draws = [token for seed in range(10) for token in chosen(logits, seed=seed, **settings)]
    counts = torch.bincount(torch.tensor(draws), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts[kept] - len(draws) * expected[kept]) ** 2 / (len(draws) * expected[kept])).sum()
    degrees = int(kept.sum()) - 1
    assert degrees > 3
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_noise_is_exponential_and_independent_between_positions_seeds_and_tokens():
    tokens = np.arange(400)
    noise = np.stack([exponential_noise(seed, position, tokens) for seed in range(5) for position in range(50)])
    ordered = np.sort(noise.ravel())
    empirical = np.arange(1, len(ordered) + 1) / len(ordered)
    assert np.abs(empirical - (1 - np.exp(-ordered))).max() < 1.95 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, 0.1%
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise[:200], noise[50:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5
    assert len(np.unique(noise)) == noise.size


def test_noise_belongs_to_the_token_whichever_others_are_asked_for():
    whole = exponential_noise(7, 30, np.arange(1000))
    assert np.array_equal(exponential_noise(7, 30, np.array([999, 3])), whole[[999, 3]])


def test_seeds_reproduce_and_no_seed_differs():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert chosen(logits, seed=5) == chosen(logits, seed=5)
    assert chosen(logits, seed=5) != chosen(logits, seed=6)
    assert chosen(logits) != chosen(logits)


def test_a_guess_from_the_same_logits_is_the_choice():
    logits = torch.randn(80, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(Sampling(seed=1, presence_penalty=0.5, logit_bias={3: 2.0}), [0], 80)
    for position in range(100):
        guess = sampler.guess(logits, position)
        token = sampler.choose(Logits.of(logits), position)
        assert guess == token
        sampler.accept(token)


@pytest.mark.parametrize("seed", range(5))
def test_bias_and_penalties_are_those_of_a_loop_over_the_vocabulary(seed):
    rng = np.random.default_rng(seed)
    size = 20
    prompt, said = rng.integers(0, size, 5).tolist(), rng.integers(0, size, 9).tolist()
    bias = {int(t): float(rng.normal()) for t in rng.integers(0, size, 3)}
    settings = Sampling(
        temperature=0.0, logit_bias=bias, repetition_penalty=float(rng.uniform(0.5, 2)),
        presence_penalty=float(rng.uniform(-2, 2)), frequency_penalty=float(rng.uniform(-2, 2)),
    )  # fmt: skip
    for trial in range(30):
        logits = torch.tensor(rng.normal(size=size), dtype=torch.float32)
        expected = logits.tolist()
        for token in range(size):
            expected[token] += bias.get(token, 0.0)
            if token in prompt + said:
                penalty = settings.repetition_penalty
                expected[token] *= 1 / penalty if expected[token] > 0 else penalty
            expected[token] -= settings.frequency_penalty * said.count(token)
            expected[token] -= settings.presence_penalty * (token in said)
        sampler = Sampler(settings, prompt, size)
        for token in said:
            sampler.accept(token)
        assert sampler.choose(Logits.of(logits), trial) == int(np.argmax(expected))


class Allowing:
    """A constraint that allows given tokens and notes what comes."""

    def __init__(self, tokens, packed=False):
        self.tokens, self.packed, self.seen = tokens, packed, []

    def mask(self, vocab_size):
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[self.tokens] = True
        if not self.packed:
            return mask
        words = np.zeros(-(-vocab_size // 32), np.uint32)
        for token in self.tokens:
            words[token // 32] |= np.uint32(1 << (token % 32))
        return torch.from_numpy(words.view(np.int32))

    def accept(self, token):
        self.seen.append(token)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_a_constraint_allows_is_chosen(packed, temperature):
    logits = torch.randn(71, generator=torch.Generator().manual_seed(1))
    logits[40] = 30.0
    constraint = Allowing([3, 31, 32, 70], packed)
    sampler = Sampler(Sampling(temperature=temperature, top_p=1.0, constraint=constraint), [0], 71)
    tokens = {sampler.choose(Logits.of(logits), position) for position in range(300)}
    assert tokens <= {3, 31, 32, 70}
    assert temperature == 0 or len(tokens) == 4
    sampler.accept(31)
    assert constraint.seen == [31]


def test_a_constraint_that_allows_nothing_gives_no_token():
    assert Sampler(Sampling(constraint=Allowing([])), [0], 5).choose(Logits.of(torch.zeros(5)), 0) is None


def test_masks_are_unpacked_lowest_bit_first():
    mask = torch.tensor([1 << 5 | 1, -(2**31)], dtype=torch.int32)
    assert unpacked(mask, 64).nonzero().flatten().tolist() == [0, 5, 63]


def test_top_log_probabilities_are_the_likeliest_in_order():
    logits = torch.tensor([0.0, 3.0, -1.0, 2.0])
    logprobs = log_probabilities(logits)
    assert [token for token, _ in top_of(logprobs, 3)] == [1, 3, 0]
    assert [value for _, value in top_of(logprobs, 9)] == pytest.approx(sorted(logprobs.tolist(), reverse=True))
    assert sum(math.exp(value) for _, value in top_of(logprobs, 9)) == pytest.approx(1.0)
    assert top_of(logprobs, 0) == ()
