"""What a validation looks at besides bits per byte: how often each prediction is right, how decided the routers are.

Shapes: B sequences, S tokens, T positions, K predictions (main model, then MTP depths), M MoE layers, E experts,
N positions, D model width, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benthic.data.batches import Batch, validation_batches
from benthic.data.shards import TokenStore
from benthic.model import Routing, Trainable
from benthic.ops.cross_entropy import IGNORE
from benthic.parallel.stages import pipeline_of, routers_here
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import prediction_targets
from benthic.train.pipelined import precision

PROBED_TOKENS = 8192
"""Enough for half a percent; the logits that accuracy needs are costly."""
_CHUNK = 512
_Found = tuple[Tensor, Tensor, Tensor, Tensor]
""":class:`_Sums`."""


class Probe(NamedTuple):
    """Means over some held-out positions."""

    top1_accuracy: list[float]
    """Share of tokens that are the likeliest by the main model, then by each MTP depth."""
    router_entropy: list[float]
    """Nats, by MoE layer, of a token's affinities normalised over experts; at most ln E, if none is favoured."""


class _Judged:
    """A batch on its way through the stages of a pipeline; each process has what its own stages find."""

    def __init__(self, batch: Batch, depths: int, moe_layers: int) -> None:
        self._batch, self.depths, self.tokens_BS = batch, depths, batch.tokens_BS[:, :-1]
        self.document_BT = None if batch.document_BS is None else batch.document_BS[:, : -1 - depths]
        self._right_K, self._counted_K = (torch.zeros(depths + 1, dtype=torch.long) for _ in range(2))
        self._entropy_M = torch.zeros(moe_layers)
        self._positions = torch.tensor(0)

    @property
    def found(self) -> _Found:
        """What :class:`_Sums` would give, or this process's part of it."""
        return self._right_K, self._counted_K, self._entropy_M, self._positions

    def routed(self, first: int, routings: list[Routing]) -> None:
        """Notes entropies."""
        for number, routing in enumerate(routings, start=first):
            self._entropy_M[number] = affinity_entropy(routing.scores).sum()

    def predicted(self, states: list[Tensor], head_VD: Tensor) -> Tensor:
        """Notes hits."""
        self._right_K, self._counted_K, self._positions = _hits(states, head_VD, self._batch)
        return states[0].new_zeros(())


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
        batch = Batch(tokens_BS, document_BS, learn_BS)
        right_K, counted_K, positions = _hits(states, self.model.transformer.head.weight, batch)
        entropies = [float(affinity_entropy(routing.scores).sum()) for routing in routings]
        return right_K, counted_K, torch.tensor(entropies), positions


def _hits(states: list[Tensor], head_VD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Right predictions (K,), targets (K,) and positions ()."""
    targets_KBT = prediction_targets(batch.tokens_BS, batch.document_BS, len(states), batch.learn_BS)
    right = [
        top1_hits(x_BTD.flatten(0, 1), head_VD, target_BT.flatten())
        for x_BTD, target_BT in zip(states, targets_KBT, strict=True)
    ]
    return torch.tensor(right), (targets_KBT != IGNORE).sum((1, 2)).cpu(), torch.tensor(targets_KBT[0].numel())


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
    # The split's last sequence may be too short for all depths.
    long_enough = (batch for batch in batches if batch.tokens_BS.shape[1] > 1 + len(model.mtp))
    parts = [[part * counts for part in found] for found, counts in _sums_of_shared(model, long_enough, compute, world)]
    if not parts:
        return Probe([], [])
    sums = [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]
    if pipeline := pipeline_of(model):
        sums = [pipeline.total(one) for one in sums]
    right_K, counted_K, entropy_M, positions = (world.total(one) for one in sums)
    return Probe((right_K / counted_K.clamp_min(1)).tolist(), (entropy_M / positions).tolist())


def _sums_of_shared(
    model: Trainable, batches: Iterable[Batch], compute: Compute, world: World
) -> Iterator[tuple[_Found, bool]]:
    """Of the batches of this process, and whether they count."""
    pipeline = pipeline_of(model)
    if pipeline is None:
        sums = _Sums(model)
        for batch, counts in world.share(batches):
            yield compute_in(compute, sums, *batch), counts
        return
    shared = [
        (_Judged(batch, len(model.mtp), len(routers_here(model))), counts) for batch, counts in world.share(batches)
    ]
    if shared:
        pipeline.forward([judged for judged, _ in shared], *precision(model, compute))
    yield from ((judged.found, counts) for judged, counts in shared)


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
