"""Samples packed into training sequences, each of them whole and unseen by the others (V3 report section 5.1).

Positions run on through a sequence: MLA's scores depend on the distance of two positions alone, so that a sample packed
behind others is read as it would be at the beginning.

Dimensions: B sequences, S positions of a sequence including its lookahead.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from benthic.data.batches import Batch
from benthic.data.shards import Tokens, TokenStore

_BLOCK = 1 << 20
OPEN = 64
"""Sequences that are filled at once: with so many, hardly any room is left unused."""


def pack(lengths: Iterable[int], capacity: int) -> Iterator[list[int]]:
    """Groups of items, by their numbers, whose lengths together are at most ``capacity``; no item is in two.

    Each item joins the open group with the least room that it fits into. An item longer than ``capacity`` is an error.
    """
    rooms: list[tuple[int, int]] = []  # of the open groups, sorted: room left, number of the group's first item
    groups: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"item {item}: length {length} is more than {capacity}")
        place = bisect_left(rooms, (length, -1))
        room, first = rooms.pop(place) if place < len(rooms) else (capacity, item)
        groups.setdefault(first, []).append(item)
        insort(rooms, (room - length, first))
        if len(rooms) > OPEN:
            yield groups.pop(rooms.pop(0)[1])
    for _, first in rooms:
        yield groups[first]


class AnswerStore:
    """Samples on disk: a split whose tokens carry the mark of answers.

    The id of an answer's token is stored with the vocabulary's size added.
    """

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self.vocab_size = store.manifest.vocab_size // 2
        self.starts = np.concatenate(([0], store.document_ends_D[:-1]))
        self.lengths = np.diff(store.document_ends_D, prepend=0)

    def read(self, sample: int) -> tuple[Tokens, Tokens]:
        """Ids of a sample, and whether each belongs to an answer."""
        start, length = int(self.starts[sample]), int(self.lengths[sample])
        learn, ids = np.divmod(self.store.take(np.arange(start, start + length)), self.vocab_size)
        return ids, learn

    def answer_tokens(self) -> int:
        """Tokens of answers in all samples."""
        ends = [*range(0, self.store.tokens, _BLOCK), self.store.tokens]
        blocks = (self.store.take(np.arange(start, end)) for start, end in pairwise(ends))
        return sum(int((block >= self.vocab_size).sum()) for block in blocks)

    def batch(self, groups: Sequence[Sequence[int]], length: int, lookahead: int, padding: int) -> Batch:
        """A sequence of ``length + lookahead`` tokens for each group of samples, filled up with ``padding``."""
        shape = len(groups), length + lookahead
        tokens_BS = np.full(shape, padding, dtype=np.int64)
        document_BS = np.full(shape, -1, dtype=np.int64)
        learn_BS = np.zeros(shape, dtype=np.bool_)
        for row, group in enumerate(groups):
            start = 0
            for number, sample in enumerate(group):
                ids, learn = self.read(sample)
                place = slice(start, start + len(ids))
                tokens_BS[row, place], learn_BS[row, place], document_BS[row, place] = ids, learn, number
                start += len(ids)
        return Batch(torch.from_numpy(tokens_BS), torch.from_numpy(document_BS), torch.from_numpy(learn_BS))


class PackedBatches:
    """Training sequences of packed samples, random-access: a run's place is one integer.

    Every epoch draws each sample as often as its source's weight says (of a weight's fraction, as many samples, others
    each time), shuffles and packs them. The epochs follow one another in one endless stream of sequences.

    Args:
        answers: the samples, those of each source together.
        counts: samples of each source, in order.
        weights: how often an epoch draws each sample of a source.
        length: of a sequence; a sequence holds samples of ``length + 1`` tokens together, the last of which is only
            predicted.
        lookahead: tokens after ``length``: one, and one more per MTP module.
        padding: the token that fills up what room is left.
        seed: of shuffling.
    """

    def __init__(
        self, answers: AnswerStore, counts: Sequence[int], weights: Sequence[float], length: int, lookahead: int,
        padding: int, seed: int,
    ) -> None:  # fmt: skip
        self._answers, self._length, self._lookahead, self._padding = answers, length, lookahead, padding
        ends = np.cumsum(counts)
        self._sources = list(zip(ends - counts, counts, weights, strict=True))
        self._seed = seed
        self._epochs: dict[int, list[list[int]]] = {}
        self._starts = [0]
        """First sequence of each epoch that is known so far."""

    def at(self, index: int, count: int) -> Batch:
        """Sequences ``index`` to ``index + count``, counted from 0 over all epochs without end."""
        groups = [self._group(number) for number in range(index, index + count)]
        return self._answers.batch(groups, self._length, self._lookahead, self._padding)

    def sequences(self, epochs: int) -> int:
        """Of the first so many epochs."""
        while len(self._starts) <= epochs:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        return self._starts[epochs]

    def _group(self, index: int) -> list[int]:
        epoch = next(number for number in range(index + 1) if index < self.sequences(number + 1))
        return self._epoch(epoch)[index - self._starts[epoch]]

    def _epoch(self, number: int) -> list[list[int]]:
        if number not in self._epochs:
            rng = np.random.default_rng([self._seed, number])
            drawn = rng.permutation(np.concatenate([_draw(rng, *source) for source in self._sources]))
            lengths = self._answers.lengths[drawn]
            groups = [drawn[group].tolist() for group in pack(lengths.tolist(), self._length + 1)]
            shuffled = [groups[place] for place in rng.permutation(len(groups))]
            self._epochs = {
                **{key: value for key, value in self._epochs.items() if key == number - 1},
                number: shuffled,
            }
        return self._epochs[number]


def _draw(rng: np.random.Generator, start: int, count: int, weight: float) -> Tokens:
    """Samples of one source for one epoch."""
    whole = int(weight)
    part = round((weight - whole) * count)
    some = rng.permutation(count)[: part if whole else max(1, part)]
    return start + np.concatenate([np.tile(np.arange(count), whole), some])


def in_order(
    answers: AnswerStore, length: int, lookahead: int, batch_size: int, padding: int, max_tokens: int | None = None,
    *, among: slice = slice(None),
) -> Iterator[Batch]:  # fmt: skip
    """All samples once, or these ``among`` them, packed in their stored order; with ``max_tokens``, evenly spaced ones
    of about so many.
    """
    chosen = np.arange(len(answers.lengths))[among]
    if max_tokens is not None and max_tokens < answers.lengths[chosen].sum():
        count = max(1, int(len(chosen) * max_tokens / answers.lengths[chosen].sum()))
        chosen = chosen[np.arange(count) * len(chosen) // count]
    groups = [chosen[group].tolist() for group in pack(answers.lengths[chosen].tolist(), length + 1)]
    for first in range(0, len(groups), batch_size):
        yield answers.batch(groups[first : first + batch_size], length, lookahead, padding)
