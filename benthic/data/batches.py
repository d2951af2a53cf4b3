"""Training and validation sequences out of a token store, random-access, so that a run's place is one integer.

Dimensions: B sequences, S positions of a sequence including its lookahead, D documents.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benthic.config.schema import RunConfig
from benthic.data.shards import Tokens, TokenStore
from benthic.errors import InputError


class Batch(NamedTuple):
    """``tokens_BS`` (int64) and, with document masking, the id of each position's document ``document_BS`` (int64).

    Equal ids within a sequence mean the same document; the ids have no meaning beyond that. ``learn_BS`` (bool) says
    which tokens are to be predicted, if not all are.
    """

    tokens_BS: Tensor
    document_BS: Tensor | None
    learn_BS: Tensor | None = None

    def without_last(self, count: int) -> "Batch":
        """The batch without the last ``count`` tokens of each sequence."""
        kept = slice(None, self.tokens_BS.shape[1] - count)
        document_BS, learn_BS = (None if part is None else part[:, kept] for part in (self.document_BS, self.learn_BS))
        return Batch(self.tokens_BS[:, kept], document_BS, learn_BS)

    def rows(self, rows: slice) -> "Batch":
        """Some of its sequences."""
        document_BS, learn_BS = (None if part is None else part[rows] for part in (self.document_BS, self.learn_BS))
        return Batch(self.tokens_BS[rows], document_BS, learn_BS)


class _Epoch(NamedTuple):
    """An epoch's shuffled documents (indices into the store), where each ends, and its shuffled sequences."""

    order_D: Tokens
    ends_D: Tokens
    sequences: Tokens


class Batches:
    """Packed training sequences (V3 report section 4.1: documents are packed without gaps).

    Every epoch shuffles the documents and joins them; the epochs follow one another in one endless stream, which is
    cut every ``sequence_length`` tokens, so that each token is an input, and a target, exactly once per epoch.
    Sequences that begin in the same epoch are shuffled too. Each is ``sequence_length + lookahead`` tokens long:
    one token of lookahead for the next-token loss and one more per MTP module.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        lookahead: int = 1,
        *,
        seed: int = 0,
        mask_documents: bool = False,
    ) -> None:
        self._store = store
        self._length, self._lookahead = sequence_length, lookahead
        self._seed, self._mask_documents = seed, mask_documents
        self._document_lengths_D = np.diff(store.document_ends_D, prepend=0)
        self._epoch = lru_cache(maxsize=3)(self._shuffle)

    def at(self, index: int, count: int) -> Batch:
        """Sequences ``index`` to ``index + count`` of the run, counted from 0 over all epochs without end."""
        starts_B = np.array([self._start(i) for i in range(index, index + count)], dtype=np.int64)
        positions_BS = starts_B[:, None] + np.arange(self._length + self._lookahead)
        source_BS, document_BS = self._locate(positions_BS)
        return _batch(self._store.take(source_BS), document_BS if self._mask_documents else None)

    def _start(self, index: int) -> int:
        """Position in the endless stream at which a sequence begins."""
        epoch = index * self._length // self._store.tokens
        first = -(-epoch * self._store.tokens // self._length)
        return int(self._epoch(epoch).sequences[index - first]) * self._length

    def _locate(self, positions: Tokens) -> tuple[Tokens, Tokens]:
        """For positions in the endless stream, positions in the store and document ids that are unique per epoch."""
        epochs, offsets = np.divmod(positions, self._store.tokens)
        source, document = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epochs):
            inside = epochs == number
            epoch = self._epoch(int(number))
            rank = np.searchsorted(epoch.ends_D, offsets[inside], side="right")
            chosen = epoch.order_D[rank]
            source[inside] = self._store.document_ends_D[chosen] - epoch.ends_D[rank] + offsets[inside]
            document[inside] = number * len(epoch.order_D) + rank
        return source, document

    def _shuffle(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self._seed, epoch])
        order_D = rng.permutation(len(self._document_lengths_D))
        first, after = (-(-number * self._store.tokens // self._length) for number in (epoch, epoch + 1))
        return _Epoch(order_D, np.cumsum(self._document_lengths_D[order_D]), first + rng.permutation(after - first))


def training_batches(config: RunConfig, store: TokenStore) -> Batches:
    """Sequences of a run's stage, with all the lookahead that its MTP modules take."""
    return Batches(
        store,
        config.train.sequence_length,
        1 + config.model.num_nextn_predict_layers,
        seed=config.train.seed,
        mask_documents=config.data.mask_documents,
    )


def validation_batches(
    store: TokenStore,
    batch_size: int,
    sequence_length: int,
    *,
    mask_documents: bool = False,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """A split in its stored order, cut into sequences with one token of lookahead.

    Every token but the first is a target exactly once; the last batch may be one shorter sequence. ``max_tokens``
    below the size of the split gives evenly spaced sequences instead, with about so many targets.
    """
    if store.tokens < 2:
        raise InputError(f"the split has {store.tokens} token(s), at least 2 are needed")
    whole, rest = divmod(store.tokens - 1, sequence_length)
    chosen = np.arange(whole)
    if max_tokens is not None and max_tokens < store.tokens - 1:
        count = min(max(1, max_tokens // sequence_length), whole)
        chosen, rest = np.arange(count) * whole // max(count, 1), rest if whole == 0 else 0
    for first in range(0, len(chosen), batch_size):
        starts_B = chosen[first : first + batch_size] * sequence_length
        yield _stored(store, starts_B[:, None] + np.arange(sequence_length + 1), mask_documents)
    if rest:
        yield _stored(store, np.arange(store.tokens - 1 - rest, store.tokens)[None], mask_documents)


def _stored(store: TokenStore, positions_BS: Tokens, mask_documents: bool) -> Batch:
    document_BS = np.searchsorted(store.document_ends_D, positions_BS, side="right") if mask_documents else None
    return _batch(store.take(positions_BS), document_BS)


def _batch(tokens_BS: Tokens, document_BS: Tokens | None) -> Batch:
    return Batch(torch.from_numpy(tokens_BS), None if document_BS is None else torch.from_numpy(document_BS))
