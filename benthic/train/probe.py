"""What a validation looks at besides bits per byte: how often each prediction is right, how decided the routers are.

Shapes: B sequences, S tokens, T positions, K predictions (main model, then MTP depths), M MoE layers, E experts,
N positions, D model width, V vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benthic.data.batches import Batch, validation_batches
from benthic.data.shards import TokenStore
from benthic.model import Trainable
from benthic.ops.cross_entropy import IGNORE
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import prediction_targets

PROBED_TOKENS = 8192
"""Enough for half a percent; the logits that accuracy needs are costly."""
_CHUNK = 512


class Probe(NamedTuple):
    """Means over some held-out positions."""

    top1_accuracy: list[float]
    """Share of tokens that are the likeliest by the main model, then by each MTP depth."""
    router_entropy: list[float]
    """Nats, by MoE layer, of a token's affinities normalised over experts; at most ln E, if none is favoured."""


class _Sums(nn.Module):
    """Over a batch: right predictions (K,), targets (K,), entropies (M,) and positions ()."""

    def __init__(self, model: Trainable) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens_BS: Tensor, document_BS: Tensor | None, learn_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        document_BI = None if document_BS is None else document_BS[:, :-1]
        states, routings = self.model.training_hidden(tokens_BS[:, :-1], document_BI)
        targets_KBT = prediction_targets(tokens_BS, document_BS, len(states), learn_BS)
        head = self.model.transformer.head.weight
        right = [
            top1_hits(x_BTD.flatten(0, 1), head, target_BT.flatten())
            for x_BTD, target_BT in zip(states, targets_KBT, strict=True)
        ]
        entropies = [affinity_entropy(routing.scores).sum() for routing in routings]
        counted_K = (targets_KBT != IGNORE).sum((1, 2))
        return torch.tensor(right), counted_K, torch.tensor(entropies), torch.tensor(targets_KBT[0].numel())


def probe(
    model: Trainable,
    store: TokenStore,
    *,
    sequence_length: int,
    batch_size: int,
    compute: Compute = "fp32",
    mask_documents: bool = False,
    world: World = ALONE,
) -> Probe:
    """Accuracies and entropies over evenly spaced sequences of the validation split, about 8192 tokens."""
    batches = validation_batches(
        store, batch_size, sequence_length, mask_documents=mask_documents, max_tokens=PROBED_TOKENS
    )
    return probe_batches(model, batches, compute, world)


@torch.no_grad()
def probe_batches(model: Trainable, batches: Iterable[Batch], compute: Compute = "fp32", world: World = ALONE) -> Probe:
    """Accuracies on the tokens that these batches have to be predicted, and entropies at all their positions."""
    sums = _Sums(model)
    # The split's last sequence may be too short for all depths.
    long_enough = (batch for batch in batches if batch.tokens_BS.shape[1] > 1 + len(model.mtp))
    parts = [
        [part * counts for part in compute_in(compute, sums, *batch)] for batch, counts in world.share(long_enough)
    ]
    if not parts:
        return Probe([], [])
    right_K, counted_K, entropy_M, positions = (
        world.total(torch.stack(part).sum(0)) for part in zip(*parts, strict=True)
    )
    return Probe((right_K / counted_K.clamp_min(1)).tolist(), (entropy_M / positions).tolist())


def top1_hits(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> int:
    """How many targets have the highest logit; ``IGNORE`` never has."""
    hits = 0
    for x_CD, target_C in zip(x_ND.split(_CHUNK), target_N.split(_CHUNK), strict=True):
        hits += int(((x_CD @ weight_VD.T).argmax(-1) == target_C).sum())
    return hits


def affinity_entropy(scores_BTE: Tensor) -> Tensor:
    """Entropy (B, T), in nats, of affinities normalised over experts."""
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    return -torch.xlogy(share_BTE, share_BTE).sum(-1)
