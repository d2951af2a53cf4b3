"""Sampling for training: that its probabilities are the trainer's, its draws fair, and its copies alike."""

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.inference.decode import ReferenceDecoder
from benthic.model import build_model
from benthic.posttrain import rollouts
from benthic.posttrain.policy import Policy
from benthic.posttrain.rollouts import Sampler, draw, uniform

_STOP = (7, 11, 300)


@pytest.fixture(scope="module")
def model():
    built = build_model(PRESETS["tiny"], seed=1)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # sharp enough that tokens differ in probability
        for module in built.modules():
            if hasattr(module, "router"):
                module.router.bias.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    return built


def _prompts(seed, count, longest=90):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(0, 320, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(params=["native", "reference"])
def decoding(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(rollouts, "_decoder", ReferenceDecoder)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, 0.0])
def test_the_trainer_finds_the_samplers_probabilities(model, temperature):
    prompts = _prompts(0, 5)
    found = Sampler(model, _STOP).sample(prompts, list(range(15)), copies=3, max_new_tokens=40, temperature=temperature)
    with torch.no_grad():
        again = Policy(model, temperature)(
            found.tokens_NT, found.sampled_NT, found.end_N, _chosen(found), False
        ).logprob_NT
    assert (again - found.logprob_NT).abs().max() < 1e-5
    assert found.sampled_NT.sum() == (found.end_N - found.prompt_N).sum() > 100
    assert (found.logprob_NT[~found.sampled_NT] == 0).all()


def _seen(model, answers, chosen, temperature=1.0):
    policy = Policy(model, temperature)
    return policy(answers.tokens_NT, answers.sampled_NT, answers.end_N, chosen, False).logprob_NT


def _chosen(answers):
    return answers.experts_NTMK[:, :-1].permute(2, 0, 1, 3).long()


@pytest.mark.usefixtures("decoding")
def test_tokens_visit_the_experts_that_the_sampler_says(model):
    found = Sampler(model, _STOP).sample(_prompts(4, 3, longest=20), list(range(6)), copies=2, max_new_tokens=8)
    for row in range(6):
        read = int(found.end_N[row]) - 1
        _, routings = model.transformer.hidden(found.tokens_NT[row : row + 1, :read])
        for layer, routing in enumerate(routings):
            assert (
                routing.index[0].sort(-1).values.tolist()
                == found.experts_NTMK[row, :read, layer].sort(-1).values.tolist()
            )


def test_training_goes_through_experts_that_the_router_would_not_choose_now(model):
    """As after an update: by other experts, probabilities differ."""
    found = Sampler(model, _STOP).sample(_prompts(5, 2, longest=20), [1, 2], max_new_tokens=8)
    seen = [_seen(model, found, chosen) for chosen in (_chosen(found), (_chosen(found) + 1) % 8)]
    assert (seen[0] - found.logprob_NT).abs().max() < 1e-5
    assert (seen[1] - found.logprob_NT).abs().max() > 1e-3


@pytest.mark.usefixtures("decoding")
def test_answers_are_what_the_model_says_one_token_at_a_time(model):
    prompts, seeds = _prompts(1, 3, longest=20), [5, 6, 7]
    found = Sampler(model, _STOP).sample(prompts, seeds, max_new_tokens=12)
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        ids, finished = list(prompt), False
        while len(ids) < len(prompt) + 12 and not finished:
            with torch.no_grad():
                logits = model.transformer(torch.tensor([ids]))[0, -1:]
            probability = logits.double().softmax(-1)[0]
            noise = uniform(torch.tensor([seed]), torch.tensor([len(ids)]))
            ids.append(int((probability.cumsum(0) <= noise).sum()))
            finished = ids[-1] in _STOP
        assert found.tokens_NT[number, : found.end_N[number]].tolist() == ids
        assert bool(found.finished_N[number]) == finished
        assert found.answer_ids(number) == ids[len(prompt) : len(ids) - finished]


def test_company_changes_nothing(model):
    prompts = _prompts(2, 7)
    seeds = list(range(100, 121))
    whole = Sampler(model, _STOP).sample(prompts, seeds, copies=3, max_new_tokens=20)
    parts = Sampler(model, _STOP, at_once=4).sample(prompts, seeds, copies=3, max_new_tokens=20)
    for ours, theirs in zip(whole, parts, strict=True):
        assert torch.equal(ours, theirs)
    alone = Sampler(model, _STOP).sample(prompts[3:4], seeds[10:11], max_new_tokens=20)
    width = alone.tokens_NT.shape[1]
    assert torch.equal(alone.tokens_NT[0], whole.tokens_NT[10, :width])
    assert torch.equal(alone.logprob_NT[0], whole.logprob_NT[10, :width])


def test_equal_seeds_give_equal_answers_and_others_differ(model):
    prompt = [list(range(20))]
    first, second = (Sampler(model, _STOP).sample(prompt, [3, 3, 4], copies=3, max_new_tokens=20) for _ in range(2))
    assert torch.equal(first.tokens_NT, second.tokens_NT)
    assert torch.equal(first.tokens_NT[0], first.tokens_NT[1])
    assert not torch.equal(first.tokens_NT[0], first.tokens_NT[2])


def test_new_weights_are_sampled_from_at_once(model):
    prompts = _prompts(3, 4)
    other = build_model(PRESETS["tiny"], seed=9)
    other.load_state_dict(model.state_dict())
    sampler = Sampler(other, _STOP)
    sampler.sample(prompts, [1, 2, 3, 4], max_new_tokens=10)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    found = sampler.sample(prompts, [1, 2, 3, 4], max_new_tokens=10)
    with torch.no_grad():
        again = _seen(other, found, _chosen(found))
    assert (again - found.logprob_NT).abs().max() < 1e-5


def test_answers_end_where_the_context_does(model):
    prompts = [[1] * 250, [1] * 256, [1] * 10]
    found = Sampler(model, ()).sample(prompts, [1, 2, 3], max_new_tokens=30)
    assert (found.end_N - found.prompt_N).tolist() == [6, 0, 30]
    assert not found.finished_N.any()


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 130, generator=generator) * 2
    count = 200_000
    noise = uniform(torch.full((count,), 5), torch.arange(count))
    tokens, logprobs, entropies = draw(logits.expand(count, -1), noise, 0.8)
    probability = (logits[0].double() / 0.8).softmax(0)
    found = torch.bincount(tokens, minlength=130) / count
    deviation = (probability * (1 - probability) / count).sqrt()
    assert ((found - probability).abs() < 5 * deviation + 1e-9).all()
    torch.testing.assert_close(logprobs.double(), probability.log()[tokens], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies[0].double(), -(probability * probability.log()).sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 65, 1000])
def test_a_draw_at_either_end_has_some_probability(vocabulary):
    logits = torch.full((4, vocabulary), float("-inf"))
    logits[:, vocabulary // 2] = 0.0
    tokens, *_ = draw(logits, torch.tensor([0.0, 0.3, 0.999999, 1 - 2.0**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [vocabulary // 2] * 4


def test_noise_is_that_of_splitmix():
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    for seed, place in ((0, 0), (1, 2), (2**62 + 12345, 4096), (2**63 - 1, 7)):
        expected = (mix((mix(seed) + place * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53
        assert uniform(torch.tensor([seed]), torch.tensor([place])).item() == expected


def test_given_experts_are_visited(model):
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    hidden, routings = model.transformer.hidden(tokens)
    chosen = torch.stack([routing.index for routing in routings])
    same, _ = model.transformer.hidden(tokens, chosen_MBTK=chosen)
    assert torch.equal(same, hidden)
    other, told = model.transformer.hidden(tokens, chosen_MBTK=(chosen + 1) % 8)
    assert not torch.allclose(other, hidden)
    assert torch.equal(told[1].index, (chosen[1] + 1) % 8)
    # The router still says with what weight, and learns from it.
    other.sum().backward()
    assert model.transformer.layers[1].ffn.router.weight.grad.abs().sum() > 0
    model.zero_grad()
