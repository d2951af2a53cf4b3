"""Packed sequences: every sample whole, once an epoch times its weight, and found by its number alone."""

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benthic.posttrain.packing import AnswerStore, PackedBatches, in_order, pack

VOCABULARY = 1000


def stored(samples):
    """Samples, lists of (id, learn), as a store has them."""
    tokens = np.array([index + learn * VOCABULARY for sample in samples for index, learn in sample])
    return AnswerStore(
        SimpleNamespace(
            manifest=SimpleNamespace(vocab_size=2 * VOCABULARY),
            document_ends_D=np.cumsum([len(sample) for sample in samples]),
            tokens=len(tokens),
            take=tokens.__getitem__,
        )
    )


def make(rng, count, longest):
    """Samples whose first token is their number."""
    return [
        [(number, False), *((rng.randrange(900, 999), rng.random() < 0.5) for _ in range(rng.randrange(1, longest)))]
        for number in range(count)
    ]


def unpacked(batch):
    """Samples in a batch, in order; the reference walks token by token."""
    found = []
    for tokens, documents, learn in zip(*(part.tolist() for part in batch), strict=True):
        before = None
        for token, document, learnt in zip(tokens, documents, learn, strict=True):
            if document == -1:
                assert (token, learnt) == (7, False)
            elif document == before:
                found[-1].append((token, learnt))
            else:
                found.append([(token, learnt)])
            assert before != -1 or document == -1  # padding is at the end
            before = document
    return found


@pytest.mark.parametrize("seed", range(10))
def test_every_item_is_in_one_group_and_none_is_too_full(seed):
    rng = random.Random(seed)
    capacity = rng.randrange(1, 300)
    lengths = [rng.randrange(1, capacity + 1) for _ in range(rng.randrange(500))]
    groups = list(pack(lengths, capacity))
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in group) <= capacity for group in groups)


def test_hardly_any_room_is_left():
    rng = random.Random(0)
    lengths = [rng.randrange(5, 150) for _ in range(2000)]
    assert len(list(pack(lengths, 256))) <= 1.04 * sum(lengths) / 256


def test_an_item_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="item 1: length 9 is more than 8"):
        list(pack([8, 9], 8))


@pytest.mark.parametrize("seed", range(4))
def test_an_epoch_has_every_sample_as_often_as_its_source_weighs(seed):
    rng = random.Random(seed)
    samples, counts, weights = make(rng, 60, 12), [10, 30, 20], [2.0, 0.5, 1.25]
    batches = PackedBatches(stored(samples), counts, weights, 24, 3, 7, seed)
    seen = []
    for epoch in range(3):
        first, after = batches.sequences(epoch), batches.sequences(epoch + 1)
        found = unpacked(batches.at(first, after - first))
        assert all(sample == samples[sample[0][0]] for sample in found)
        times = Counter(sample[0][0] for sample in found)
        assert all(times[number] == 2 for number in range(10))
        half = {number for number in range(10, 40) if times[number]}
        assert (len(half), {times[number] for number in half}) == (15, {1})
        assert sorted(times[number] for number in range(40, 60)) == [1] * 15 + [2] * 5
        seen.append(half)
    assert seen[0] != seen[1]


def test_a_batch_depends_on_its_number_alone():
    samples = make(random.Random(3), 40, 12)

    def batches():
        return PackedBatches(stored(samples), [40], [1.0], 24, 2, 7, 5)

    one = batches()
    in_turn = [one.at(number, 1) for number in range(60)]
    other = batches()
    for number in random.Random(0).sample(range(60), 20):
        assert all(map(torch.equal, other.at(number, 1), in_turn[number]))
    several = batches().at(17, 5)
    for row, whole in enumerate(in_turn[17:22]):
        assert all(torch.equal(part[row], of[0]) for part, of in zip(several, whole, strict=True))


def test_what_is_held_out_is_read_once_and_in_order():
    samples = make(random.Random(1), 50, 12)
    found = [sample for batch in in_order(stored(samples), 24, 1, 4, 7) for sample in unpacked(batch)]
    assert sorted(found) == sorted(samples)
    assert stored(samples).answer_tokens() == sum(learn for sample in samples for _, learn in sample)
    some = [sample for batch in in_order(stored(samples), 24, 1, 4, 7, max_tokens=80) for sample in unpacked(batch)]
    assert 5 <= len(some) <= 20
    assert all(sample in samples for sample in some)
