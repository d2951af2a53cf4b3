"""What is left out of a batch of answers, because it changes nothing: equal answers, and those without advantage."""

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.model import build_model
from benthic.posttrain.grpo import Clipping, token_weights
from benthic.posttrain.policy import Policy
from benthic.posttrain.rollout_gradients import Rollouts, backward, distinct, with_advantage
from benthic.posttrain.rollouts import Sampler


@pytest.fixture(scope="module")
def sampled():
    """Two answers of at most two tokens to each of four prompts, 24 times, from a model that is sure of itself."""
    model = build_model(PRESETS["tiny"], seed=1)
    with torch.no_grad():
        model.transformer.head.weight.mul_(60)
    prompts = [[3, 5, 8], [3, 5, 8], [9, 1], [7]]
    answers = Sampler(model, (7, 11)).sample(prompts, list(range(96)), copies=24, max_new_tokens=2)
    return model, answers


def _rollouts(answers, average, reference):
    """Advantages of -1, 0 and 1 by what an answer ends with, and otherwise in the second group."""
    last_N = answers.tokens_NT.gather(1, answers.end_N[:, None] - 1)[:, 0]
    group_N = torch.arange(96) // 24
    advantage_N = ((last_N + (group_N == 1)) % 3 - 1).float()
    reference_NT = answers.logprob_NT - 0.3 if reference else None
    return Rollouts(answers, reference_NT, advantage_N, token_weights(answers.sampled_NT, average, 2))


def _gradients(model, rollouts, kl_weight):
    policy = Policy(model, 1.0)
    model.zero_grad()
    _, figures = backward(policy, rollouts, Clipping(0.2, 0.28, kl_weight), 0.0, micro_batch_size=7, compute="fp32")
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}, figures


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_equal_answers_count_as_many(sampled, average, kl_weight):
    model, answers = sampled
    everything = _rollouts(answers, average, reference=kl_weight > 0)
    few = distinct(everything)
    assert 8 < len(few.answers.end_N) < 60
    pairs = zip(answers.tokens_NT.tolist(), everything.advantage_N.tolist(), strict=True)
    assert len(few.answers.end_N) == len({(*tokens, worth) for tokens, worth in pairs})
    assert few.weight_NT.sum() == pytest.approx(everything.weight_NT.sum())
    (expected, told), (found, told_too) = (_gradients(model, one, kl_weight) for one in (everything, few))
    _assert_same(found, expected)
    for key in ("loss", "kl", "clip_share"):
        assert told_too[key] == pytest.approx(told[key], abs=1e-6)


def test_answers_without_advantage_pull_nowhere(sampled):
    model, answers = sampled
    everything = _rollouts(answers, "token", reference=False)
    few = with_advantage(everything)
    assert len(few.answers.end_N) == int((everything.advantage_N != 0).sum()) < 96
    (expected, _), (found, _) = (_gradients(model, one, 0.0) for one in (everything, few))
    _assert_same(found, expected)


def test_where_none_has_an_advantage_all_are_left(sampled):
    _, answers = sampled
    nothing = _rollouts(answers, "token", reference=False)._replace(advantage_N=torch.zeros(96))
    assert with_advantage(nothing) is nothing
