"""GRPO's loss beside loops over plain floats written from the paper (arXiv 2402.03300), and beside TRL's."""

import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from benthic.posttrain.grpo import Clipping, differing, group_advantages, k3, policy_loss, token_weights


def _batch(seed, *, answers=12, positions=9, stray=0.3):
    """Log-probabilities of random answers of random lengths, all different, and advantages."""
    draw = torch.Generator().manual_seed(seed)
    new = -torch.rand(answers, positions, generator=draw, dtype=torch.float64) * 3 - 0.01
    old, reference = (
        new + stray * torch.randn(answers, positions, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    lengths = torch.randint(1, positions + 1, (answers, 1), generator=draw)
    mask = torch.arange(positions) < lengths
    return new.requires_grad_(), old, reference, torch.randn(answers, generator=draw, dtype=torch.float64), mask


def _as_published(new, old, reference, advantage, lengths, settings, average, longest):
    """Equations 3 and 4, a token at a time, negated."""
    total, sums, tokens = 0.0, [], sum(lengths)
    for i, length in enumerate(lengths):
        inner = 0.0
        for t in range(length):
            ratio = math.exp(new[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            other = math.exp(reference[i][t] - new[i][t])
            divergence = other - math.log(other) - 1
            inner += min(ratio * advantage[i], clipped * advantage[i]) - settings.kl_weight * divergence
        sums.append(inner)
    for inner, length in zip(sums, lengths, strict=True):
        total += inner / {"sequence": length * len(sums), "token": tokens, "constant": longest * len(sums)}[average]
    return -total


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize(
    "settings", [Clipping(), Clipping(0.2, 0.28, 0.0), Clipping(0.1, 0.5, 1.0)], ids=["published", "no-kl", "uneven"]
)
def test_loss_is_that_of_the_paper(settings, average):
    for seed in range(20):
        new, old, reference, advantage, mask = _batch(seed)
        weight = token_weights(mask, average, longest=11)
        found = policy_loss(new, old, reference, advantage, weight, settings)
        lengths = mask.sum(1).tolist()
        expected = _as_published(
            new.tolist(), old.tolist(), reference.tolist(), advantage.tolist(), lengths, settings, average, 11
        )
        assert found.loss.item() == pytest.approx(expected, abs=1e-6)
        assert 0 <= found.clipped <= 1


def test_single_precision_agrees_too():
    for seed in range(20):
        *exact, mask = _batch(seed)
        weight = token_weights(mask, "sequence", 9)
        double = policy_loss(*exact, weight, Clipping()).loss
        single = policy_loss(*(x.float() for x in exact), weight, Clipping()).loss
        assert single.item() == pytest.approx(double.item(), abs=1e-6)


def test_gradient_is_that_of_finite_differences():
    new, old, reference, advantage, mask = _batch(3, answers=4, positions=5)
    weight = token_weights(mask, "token", 5)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, reference, advantage, weight, Clipping()).loss, new, eps=1e-7, atol=1e-6
    )


def test_parts_of_a_batch_add_up():
    new, old, reference, advantage, mask = _batch(5)
    for average in ("sequence", "token", "constant"):
        weight = token_weights(mask, average, 9)
        whole = policy_loss(new, old, reference, advantage, weight, Clipping())
        parts = [
            policy_loss(new[rows], old[rows], reference[rows], advantage[rows], weight[rows], Clipping())
            for rows in (slice(0, 5), slice(5, 6), slice(6, 12))
        ]
        for name in ("loss", "kl", "clipped"):
            torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_what_is_not_an_answer_changes_nothing():
    new, old, reference, advantage, mask = _batch(6)
    weight = token_weights(mask, "sequence", 9)
    clean = policy_loss(new, old, reference, advantage, weight, Clipping())
    wild = [x.detach().masked_fill(~mask, value) for x, value in ((new, math.nan), (old, -math.inf), (reference, 1e9))]
    new_again = wild[0].requires_grad_()
    dirty = policy_loss(new_again, wild[1], wild[2], advantage, weight, Clipping())
    assert dirty.loss == clean.loss
    gradient = torch.autograd.grad(dirty.loss, new_again)[0]
    assert torch.equal(gradient, torch.autograd.grad(clean.loss, new)[0])


def test_a_token_that_went_far_enough_pulls_no_more():
    settings = Clipping(0.2, 0.3, 0.0)
    for ratio, advantage, pulls in (
        (1.25, 1, True),
        (1.35, 1, False),
        (0.7, 1, True),
        (0.7, -1, False),
        (1.9, -1, True),
    ):
        new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
        found = policy_loss(new, torch.zeros(1, 1), None, torch.tensor([float(advantage)]), torch.ones(1, 1), settings)
        gradient = torch.autograd.grad(found.loss, new)[0].item()
        assert gradient == pytest.approx(-ratio * advantage if pulls else 0)
        assert found.clipped == (not pulls)


def test_divergence_is_estimated_without_bias():
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(7, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    estimates = k3(policy, reference)
    assert (estimates >= 0).all()
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)


def test_advantages_are_those_of_the_paper():
    draw = torch.Generator().manual_seed(1)
    rewards = torch.rand(6, 5, generator=draw, dtype=torch.float64)
    for deviation in (True, False):
        found = group_advantages(rewards, deviation=deviation)
        for row, advantages in zip(rewards.tolist(), found.tolist(), strict=True):
            mean, spread = statistics.mean(row), statistics.stdev(row) if deviation else 1.0
            assert advantages == pytest.approx([(reward - mean) / spread for reward in row])


@pytest.mark.parametrize("deviation", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e30, -3.7])
def test_a_group_without_variance_has_finite_zero_advantage(value, deviation):
    same = torch.full((1, 7), value)
    mixed = torch.tensor([[0.0, 1.0, 0, 0, 1, 0, 0]])
    found = group_advantages(torch.cat((same, mixed)), deviation=deviation)
    assert found[0].tolist() == [0.0] * 7
    assert found[1].abs().min() > 0
    assert differing(torch.cat((same, mixed))).tolist() == [False, True]


def test_rewards_that_differ_by_rounding_are_equal():
    almost = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert group_advantages(almost).tolist() == [[0.0] * 3]


def test_a_group_of_one_has_no_advantage():
    assert group_advantages(torch.tensor([[3.0], [1.0]])).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(("theirs", "ours"), [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_loss_is_that_of_trl(theirs, ours, kl_weight):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    settings = Clipping(0.2, 0.28, kl_weight)
    for seed in range(10):
        new, old, reference, advantage, mask = _batch(seed)
        stand_in = SimpleNamespace(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level="token", _entropy_bonus_enabled=False, beta=kl_weight, loss_type=theirs,
            epsilon_low=settings.clip_low,
            epsilon_high=settings.clip_high, use_vllm=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=9, model=SimpleNamespace(training=True),
            _metrics=defaultdict(lambda: defaultdict(list)),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
            _get_per_token_logps_and_entropies=lambda *a, new=new, **k: (new, torch.zeros_like(new), None),
        )  # fmt: skip
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask.long(),
            "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": reference,
        }  # fmt: skip
        expected = trainer._compute_loss(stand_in, None, inputs)
        weight = token_weights(mask, ours, longest=9)
        found = policy_loss(new, old, reference, advantage, weight, settings)
        assert found.loss.item() == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(found.loss, new)[0], torch.autograd.grad(expected, new)[0], atol=1e-6, rtol=0
        )
