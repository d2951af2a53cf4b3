"""Answers with what they are worth, and the gradients that follow from them.

Shapes: N answers, U of them distinct, X numbers that tell them apart, T positions, M MoE layers, E experts, J depths
of multi-token prediction, K = 1 + J.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benthic.posttrain.grpo import Clipping, policy_loss
from benthic.posttrain.policy import Policy, Seen
from benthic.posttrain.rollouts import Answers
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import Losses


class Rollouts(NamedTuple):
    """Answers with what they are worth."""

    answers: Answers
    reference_NT: Tensor | None
    """Log-probabilities by the model that the stage began with."""
    advantage_N: Tensor
    weight_NT: Tensor
    used: int = 0
    """Updates that have learnt from them."""


def backward(
    policy: Policy, rollouts: Rollouts, clipping: Clipping, mtp_weight: float, *, micro_batch_size: int,
    compute: Compute,
) -> tuple[Losses, dict[str, Any]]:  # fmt: skip
    """Accumulate the gradients of GRPO's loss, and of the MTP modules' on the same answers; and what metrics say."""
    answers, counted = rollouts.answers, rollouts.answers.sampled_NT
    parts, totals = [], torch.zeros(5)
    for start in range(0, len(counted), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        seen = see(compute, policy, answers, rows, mtp=bool(mtp_weight))
        width = seen.logprob_NT.shape[1]
        old_NT, weight_NT = answers.logprob_NT[rows, :width], rollouts.weight_NT[rows, :width]
        reference_NT = None if rollouts.reference_NT is None else rollouts.reference_NT[rows, :width]
        found = policy_loss(seen.logprob_NT, old_NT, reference_NT, rollouts.advantage_N[rows], weight_NT, clipping)
        depths = len(seen.mtp_nats_J)
        share_J = _further(counted[rows], depths) / _further(counted, depths).clamp_min(1)
        nats_J = seen.mtp_nats_J * share_J
        loss = found.loss + (mtp_weight * nats_J.mean() if len(nats_J) else 0.0)
        loss.backward()
        new_NT = seen.logprob_NT.detach()
        apart_NT = (new_NT - old_NT).abs()
        totals[:4] += torch.stack([found.loss.detach(), found.kl, found.clipped, apart_NT.sum() / counted.sum()])
        totals[4] = torch.maximum(totals[4], apart_NT.max())
        nats = -new_NT.sum() / counted.sum()
        parts.append((torch.cat([nats[None], nats_J.detach()]), seen.load_ME))
    loss, kl, clipped, apart, furthest = totals.tolist()
    figures = {"loss": loss, "kl": kl, "clip_share": clipped}
    if not rollouts.used:
        figures |= {"mismatch": furthest, "mean_mismatch": apart}
    nats_K, load_ME = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return Losses(nats_K, torch.zeros(()), load_ME), figures


def see(compute: Compute, policy: Policy, answers: Answers, rows: slice, *, mtp: bool) -> Seen:
    """Some answers, without padding that none of them needs; their tokens go to the experts that they went to."""
    end_N = answers.end_N[rows]
    width = int(end_N.max())
    sampled_NT = answers.sampled_NT[rows, :width]
    chosen_MNTK = answers.experts_NTMK[rows, : width - 1].permute(2, 0, 1, 3).long().contiguous()
    seen: Seen = compute_in(compute, policy, answers.tokens_NT[rows, :width], sampled_NT, end_N, chosen_MNTK, mtp)
    return seen


def with_advantage(rollouts: Rollouts) -> Rollouts:
    """Those that pull in either direction; all, if none does. Without a reference, others teach the policy nothing."""
    kept_N = rollouts.advantage_N != 0
    return _some(rollouts, kept_N.nonzero()[:, 0]) if kept_N.any() else rollouts


def distinct(rollouts: Rollouts) -> Rollouts:
    """Equal answers to a prompt, of equal advantage, as one with the weight of all: short answers are often equal."""
    tokens_NT, prompt_N, end_N = rollouts.answers[:3]
    worth_N = rollouts.advantage_N.view(torch.int32).long()
    key_NX = torch.cat([tokens_NT, torch.stack([prompt_N, end_N, worth_N], 1)], 1)
    _, same_N, count_U = key_NX.unique(dim=0, return_inverse=True, return_counts=True)
    first_U = torch.full_like(count_U, len(same_N)).scatter_reduce(0, same_N, torch.arange(len(same_N)), "amin")
    first_U, order_U = first_U.sort()
    found = _some(rollouts, first_U)
    return found._replace(weight_NT=found.weight_NT * count_U[order_U, None])


def _some(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    answers = Answers(*(column[rows] for column in rollouts.answers))
    reference_NT = None if rollouts.reference_NT is None else rollouts.reference_NT[rows]
    return rollouts._replace(
        answers=answers, reference_NT=reference_NT, advantage_N=rollouts.advantage_N[rows],
        weight_NT=rollouts.weight_NT[rows],
    )  # fmt: skip


def _further(sampled_NT: Tensor, depths: int) -> Tensor:
    """How many sampled tokens each MTP depth predicts (J,): not those too near the beginning of their row."""
    return torch.tensor([int(sampled_NT[:, depth + 1 :].sum()) for depth in range(1, depths + 1)])
