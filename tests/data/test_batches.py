"""Batches against a plain list: every token once per epoch, whole documents, the same order however it is asked for."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from benthic.data.batches import Batches, validation_batches
from benthic.errors import InputError


class ListStore:
    """Documents in memory; token ids tell their position in the store."""

    def __init__(self, lengths):
        self.document_ends_D = np.cumsum(lengths)
        self.tokens = int(self.document_ends_D[-1])

    def take(self, positions):
        return np.asarray(positions) + 0


def random_case(seed):
    rng = random.Random(seed)
    lengths = [rng.randrange(1, rng.choice([3, 50])) for _ in range(rng.randrange(1, 40))]
    return ListStore(lengths), rng.randrange(1, 30), rng.randrange(1, 4), seed


@pytest.mark.parametrize("seed", range(20))
def test_each_token_is_an_input_and_a_target_once_per_epoch(seed):
    store, length, lookahead, _ = random_case(seed)
    batches = Batches(store, length, lookahead, seed=seed)
    epochs = length  # after so many epochs the sequences end where an epoch ends
    tokens_BS = batches.at(0, store.tokens).tokens_BS
    assert tokens_BS.shape == (store.tokens, length + lookahead)
    assert tokens_BS.dtype == torch.int64
    assert set(Counter(tokens_BS[:, :length].flatten().tolist()).values()) == {epochs}
    one_epoch = Counter(batches.at(0, -(-store.tokens // length)).tokens_BS[:, :length].flatten().tolist())
    assert len(one_epoch) == store.tokens
    assert one_epoch.total() - store.tokens < length


@pytest.mark.parametrize("seed", range(10))
def test_targets_are_what_follows_in_the_document(seed):
    store, length, lookahead, _ = random_case(seed)
    batch = Batches(store, length, lookahead, seed=seed, mask_documents=True).at(3, 50)
    tokens, documents = batch.tokens_BS, batch.document_BS
    starts = {0, *store.document_ends_D.tolist()}
    follows = tokens[:, 1:] == tokens[:, :-1] + 1
    begins = torch.tensor([[int(token) in starts for token in row] for row in tokens[:, 1:]])
    same = documents[:, 1:] == documents[:, :-1]
    assert torch.equal(same, ~begins)
    assert bool(follows[same].all())
    store_document = np.searchsorted(store.document_ends_D, tokens.numpy(), side="right")
    for row, ids in zip(store_document.tolist(), documents.tolist(), strict=True):
        assert len(set(zip(row, ids, strict=True))) == len(set(ids))


def test_the_order_depends_on_index_and_seed_alone():
    store, length, lookahead, _ = random_case(4)
    whole = Batches(store, length, lookahead, seed=1).at(0, 60).tokens_BS
    asked = random.Random(0).sample(range(60), 60)
    resumed = {index: Batches(store, length, lookahead, seed=1).at(index, 1).tokens_BS[0] for index in asked}
    assert all(torch.equal(resumed[index], whole[index]) for index in asked)
    ramp = Batches(store, length, lookahead, seed=1)
    assert torch.equal(torch.cat([ramp.at(0, 7).tokens_BS, ramp.at(7, 53).tokens_BS]), whole)
    assert not torch.equal(Batches(store, length, lookahead, seed=2).at(0, 60).tokens_BS, whole)


def test_epochs_and_sequences_are_shuffled():
    store = ListStore([100] * 20)
    batches = Batches(store, 10, 1, seed=0)
    first, second = (batches.at(start, 200).tokens_BS[:, 0].tolist() for start in (0, 200))
    assert sorted(first) == sorted(second)
    assert first != second
    in_document_order = sum(b == a + 10 for a, b in itertools.pairwise(first))
    assert in_document_order < 20


@pytest.mark.parametrize("seed", range(20))
def test_validation_has_every_token_but_the_first_as_a_target_once(seed):
    store, length, batch_size, _ = random_case(seed)
    if store.tokens < 2:
        pytest.skip("nothing to predict")
    batches = list(validation_batches(store, batch_size, length, mask_documents=True))
    targets = torch.cat([batch.tokens_BS[:, 1:].flatten() for batch in batches]).tolist()
    assert targets == list(range(1, store.tokens))
    assert all(batch.tokens_BS.shape[0] <= batch_size for batch in batches)
    for batch in batches:
        expected = np.searchsorted(store.document_ends_D, batch.tokens_BS.numpy(), side="right")
        np.testing.assert_array_equal(batch.document_BS.numpy(), expected)


@pytest.mark.parametrize("max_tokens", [1, 50, 333, 998, 999, 5000])
def test_a_shorter_validation_is_spread_over_the_split(max_tokens):
    store = ListStore([10] * 100)
    rows = [row for batch in validation_batches(store, 3, 9, max_tokens=max_tokens) for row in batch.tokens_BS]
    targets = sum(len(row) - 1 for row in rows)
    assert targets == 999 if max_tokens >= 999 else max_tokens - 9 < targets <= max(max_tokens, 9)
    gaps = {int(b[0] - a[0]) for a, b in itertools.pairwise(rows)}
    assert all(gap % 9 == 0 and gap >= 9 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 9
    if len(rows) > 5:
        assert rows[-1][0] > 700


def test_a_split_of_one_token_cannot_be_validated():
    with pytest.raises(InputError, match="at least 2"):
        next(validation_batches(ListStore([1]), 1, 4))
