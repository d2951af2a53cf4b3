"""Bits per byte of held-out text: a loss that does not depend on the tokenizer.

Shapes: B sequences, S tokens, T = S - 1 predictions, D model width.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from benthic.data.batches import Batch, validation_batches
from benthic.data.shards import TokenStore
from benthic.model import Routing, Trainable, Trunk
from benthic.ops.cross_entropy import IGNORE, linear_cross_entropy
from benthic.parallel.stages import pipeline_of
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import prediction_targets
from benthic.train.pipelined import precision


class _Judged:
    """A batch on its way through the stages of a pipeline."""

    depths = 0

    def __init__(self, batch: Batch) -> None:
        self._batch, self.tokens_BS = batch, batch.tokens_BS[:, :-1]
        self.document_BT = None if batch.document_BS is None else batch.document_BS[:, :-1]
        self.found = 0.0, 0
        """Nats and tokens, where the last stage is."""

    def routed(self, first: int, routings: list[Routing]) -> None:
        """Nothing that counts here."""

    def predicted(self, states: list[Tensor], head_VD: Tensor) -> Tensor:
        """The sum in nats."""
        self.found = _total_nats(states[0], head_VD, self._batch)
        return states[0].new_tensor(self.found[0])


class _TotalNats(nn.Module):
    """Cross-entropy of the next tokens, summed, and how many there were."""

    def __init__(self, transformer: Trunk) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens_BS: Tensor, document_BS: Tensor | None, learn_BS: Tensor | None) -> tuple[float, int]:
        document_BT = None if document_BS is None else document_BS[:, :-1]
        hidden_BTD, _ = self.transformer.hidden(tokens_BS[:, :-1], document_BT=document_BT)
        return _total_nats(hidden_BTD, self.transformer.head.weight, Batch(tokens_BS, document_BS, learn_BS))


def _total_nats(hidden_BTD: Tensor, head_VD: Tensor, batch: Batch) -> tuple[float, int]:
    target_N = prediction_targets(batch.tokens_BS, batch.document_BS, 1, batch.learn_BS).flatten()
    mean = linear_cross_entropy(hidden_BTD.flatten(0, 1), head_VD.detach(), target_N)
    counted = int((target_N != IGNORE).sum())
    return float(mean) * counted, counted


def bits_per_byte(
    model: Trainable,
    store: TokenStore,
    *,
    sequence_length: int,
    batch_size: int,
    compute: Compute = "fp32",
    mask_documents: bool = False,
    max_tokens: int | None = None,
    world: World = ALONE,
) -> float:
    """Bits the model needs for a byte of the validation split.

    The split is read in sequences of ``sequence_length``, every token predicted once. A part of it, of about
    ``max_tokens``, is charged for bytes in proportion to the tokens predicted.
    """
    batches = validation_batches(
        store, batch_size, sequence_length, mask_documents=mask_documents, max_tokens=max_tokens
    )
    # With documents masked, the first token of each is predicted by nothing.
    predicted = store.tokens - (store.manifest.val.documents if mask_documents else 1)
    return bits_per_byte_of(model, batches, predicted, store.manifest.val.bytes, compute, world)


def bits_per_byte_of(
    model: Trainable,
    batches: Iterable[Batch],
    predicted: int,
    text_bytes: int,
    compute: Compute = "fp32",
    world: World = ALONE,
) -> float:
    """Bits for a byte of a text of ``text_bytes``, ``predicted`` of whose tokens are predicted in all.

    ``batches`` may be a part of them, which is charged for bytes in proportion. Processes share them out.
    """
    found = [
        (nats, tokens) if counts else (0.0, 0)
        for (nats, tokens), counts in _nats_of_shared(model, batches, compute, world)
    ]
    sums = torch.tensor([sum(column) for column in zip(*found, strict=True)], dtype=torch.float64)
    if pipeline := pipeline_of(model):
        sums = pipeline.total(sums)
    nats: float
    nats, tokens = world.total(sums).tolist()
    return nats / math.log(2) / (text_bytes * int(tokens) / predicted)


def nats_of_batches(
    model: Trainable, batches: Iterable[Batch], compute: Compute = "fp32"
) -> Iterator[tuple[float, int]]:
    """Cross-entropy in nats, summed over each batch's tokens, and how many they were."""
    return (nats for nats, _ in _nats_of_shared(model, batches, compute, ALONE))


@torch.no_grad()
def _nats_of_shared(
    model: Trainable, batches: Iterable[Batch], compute: Compute, world: World
) -> Iterator[tuple[tuple[float, int], bool]]:
    """The same of the batches of this process, and whether they count.

    In a pipeline, where the last stage is: there are none elsewhere.
    """
    if pipeline := pipeline_of(model):
        shared = [(_Judged(batch), counts) for batch, counts in world.share(batches)]
        if shared:
            pipeline.forward([judged for judged, _ in shared], *precision(model, compute))
        yield from ((judged.found, counts) for judged, counts in shared)
        return
    total = _TotalNats(model.transformer)
    for batch, counts in world.share(batches):
        nats: tuple[float, int] = compute_in(compute, total, *batch)
        yield nats, counts
