"""Group relative policy optimisation: the arithmetic alone, without a model (arXiv 2402.03300, section 4.1).

Of each prompt a group of answers is sampled. An answer's advantage is how much better it was rewarded than its group,
so that no critic has to be trained. The variants that practice has kept are settings of one function:

- ``deviation=False`` leaves out the division by the group's deviation (Dr. GRPO, arXiv 2503.20783);
- ``average="token"`` lets every token count alike, instead of every answer (DAPO, arXiv 2503.14476, section 3.3), and
  ``"constant"`` divides by one length for all (Dr. GRPO);
- ``clip_high`` above ``clip_low`` leaves unlikely tokens more room to grow (DAPO, section 3.1);
- ``kl_weight=0`` leaves out the reference.

Shapes: N answers, G answers of a group, T positions.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Average = Literal["sequence", "token", "constant"]

_SMALLEST_SPREAD = 1e-6
"""Groups whose rewards differ by less are told apart by rounding alone: their advantages are 0."""


@dataclass(frozen=True)
class Clipping:
    """How far the ratio of new to old probability counts, and what straying from the reference costs."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.04


class PolicyLoss(NamedTuple):
    """The loss, and what it saw, each a scalar averaged as the loss is."""

    loss: Tensor
    kl: Tensor
    """Unbiased estimate of the divergence from the reference, in nats a token; 0 without one."""
    clipped: Tensor
    """Share of tokens that no longer pull, because their ratio went as far as it may."""


def group_advantages(reward_NG: Tensor, *, deviation: bool = True) -> Tensor:
    """Advantages (N, G) of the answers to N prompts: reward less the group's mean, over the group's deviation.

    Args:
        reward_NG: finite rewards.
        deviation: whether to divide by the sample's deviation (with G - 1).

    A group whose rewards are all equal has advantages of 0, and so has a group of one.
    """
    centred_NG = reward_NG - reward_NG.mean(-1, keepdim=True)
    if deviation and reward_NG.shape[-1] > 1:
        centred_NG = centred_NG / reward_NG.std(-1, keepdim=True).clamp_min(torch.finfo(reward_NG.dtype).tiny)
    return centred_NG.masked_fill(~differing(reward_NG)[..., None], 0.0)


def differing(reward_NG: Tensor) -> Tensor:
    """Which groups (N,) have anything to teach: their rewards are not all equal."""
    return reward_NG.amax(-1) - reward_NG.amin(-1) > _SMALLEST_SPREAD


def token_weights(mask_NT: Tensor, average: Average, longest: int) -> Tensor:
    """What each token of a whole batch counts in the loss (N, T); parts of a batch take their rows of it.

    Args:
        mask_NT: bool, the answers' tokens.
        average: ``sequence``, as published: mean over an answer's tokens, then over answers. ``token``: mean over all
            tokens. ``constant``: sum over an answer's tokens over ``longest``, then mean over answers.
        longest: tokens that an answer may have.
    """
    mask_NT = mask_NT.to(torch.float32)
    match average:
        case "sequence":
            return mask_NT / mask_NT.sum(-1, keepdim=True).clamp_min(1) / len(mask_NT)
        case "token":
            return mask_NT / mask_NT.sum().clamp_min(1)
        case "constant":
            return mask_NT / (longest * len(mask_NT))


def policy_loss(
    new_NT: Tensor, old_NT: Tensor, reference_NT: Tensor | None, advantage_N: Tensor, weight_NT: Tensor,
    settings: Clipping,
) -> PolicyLoss:  # fmt: skip
    """Equation 3 with the divergence of equation 4, negated for descent; summed with the given weights.

    Args:
        new_NT: log-probabilities of the sampled tokens under the policy that learns; the gradient goes through these.
        old_NT: the same under the policy that sampled them.
        reference_NT: the same under the frozen reference; needed where ``kl_weight`` is not 0.
        advantage_N: of each answer.
        weight_NT: from :func:`token_weights`; where it is 0, nothing else is looked at.
        settings: clipping range and weight of the divergence.
    """
    counted_NT = weight_NT > 0
    # What is not counted may hold anything, and times a weight of 0 infinity is NaN.
    old_NT, new_NT = (x_NT.where(counted_NT, torch.zeros_like(x_NT)) for x_NT in (old_NT, new_NT))
    ratio_NT = (new_NT - old_NT).exp()
    bounded_NT = ratio_NT.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    advantage_N1 = advantage_N[:, None]
    gain_NT = torch.minimum(ratio_NT * advantage_N1, bounded_NT * advantage_N1)
    clipped_NT = (bounded_NT * advantage_N1 < ratio_NT * advantage_N1).to(weight_NT.dtype)
    kl_NT = torch.zeros_like(new_NT)
    if settings.kl_weight:
        assert reference_NT is not None
        kl_NT = k3(new_NT, reference_NT.where(counted_NT, new_NT.detach()))
    loss = ((settings.kl_weight * kl_NT - gain_NT) * weight_NT).sum()
    return PolicyLoss(loss, (kl_NT * weight_NT).sum().detach(), (clipped_NT * weight_NT).sum().detach())


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """Unbiased estimate of KL(policy || reference), never negative, from log-probabilities of tokens sampled from the
    policy (equation 4).
    """
    log_ratio = reference - new
    return torch.expm1(log_ratio) - log_ratio
