"""Hashes of tensors, and which rank is named when copies differ."""

import pytest
import torch

from benthic.parallel.hash import differences, hash_of, hashes_of
from benthic.parallel.pieces import Cut, cut, whole

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def slow_hash(tensor) -> int:
    """The same in Python's integers."""
    words = tensor.flatten().view({1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)).tolist()
    total = 0
    for place, word in enumerate(words, start=1):
        x = place * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += word * ((x ^ x >> 31) | 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (2, 3, 5), (0, 4)])
def test_against_pythons_integers(dtype, shape, monkeypatch):
    monkeypatch.setattr("benthic.parallel.hash._CHUNK", 8)
    tensor = (torch.randn(shape) * 50).to(dtype)
    assert hash_of(tensor).item() == slow_hash(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype):
    tensor = (torch.randn(5, 3) * 50).to(dtype)
    before = hash_of(tensor).item()
    octets = tensor.view(torch.uint8).flatten()
    for place in range(len(octets)):
        for bit in range(8):
            octets[place] ^= 1 << bit
            assert hash_of(tensor).item() != before
            octets[place] ^= 1 << bit
    assert hash_of(tensor).item() == before


def test_places_count():
    a = torch.randn(100)
    b = a.clone()
    b[[3, 70]] = b[[70, 3]]
    assert hash_of(a) != hash_of(b)
    assert hash_of(torch.tensor([0.0, 1.0])) != hash_of(torch.tensor([1.0, 0.0]))
    assert hash_of(torch.tensor([0.0])) != hash_of(torch.tensor([-0.0]))


def test_a_part_that_is_not_contiguous_is_hashed_as_its_copy():
    tensor = torch.randn(6, 4)
    assert hash_of(tensor[:, 1:3]) == hash_of(tensor[:, 1:3].clone())


HALVES = [cut(whole("w", (4, 2)), [Cut(0, 2, number)]) for number in range(2)]
BIAS = whole("bias", (3,))


def compared(*ranks):
    """Ranks as lists of pieces, each with its tensors in groups; what is found to differ."""
    holdings = [{piece.name: piece for piece, _ in rank} for rank in ranks]
    numbers = []
    for rank, held in enumerate(ranks):
        groups = {"model": {piece.name: tensors[0] for piece, tensors in held}}
        groups["optimizer"] = {f"{piece.name}.momentum": tensors[1] for piece, tensors in held if len(tensors) > 1}
        numbers.append(hashes_of(groups, holdings, rank))
    return [str(one) for one in differences(holdings, numbers)]


A, B = torch.randn(3), torch.randn(3)
C, D = torch.randn(2, 2), torch.randn(2, 2)


def test_copies_that_are_equal_raise_nothing():
    assert compared([(HALVES[0], [C]), (BIAS, [A])], [(HALVES[1], [D]), (BIAS, [A])]) == []


def test_of_three_copies_the_odd_one_is_named():
    assert compared([(BIAS, [A])], [(BIAS, [B])], [(BIAS, [A])]) == [
        "bias of rank 1 differs from that of ranks 0 and 2"
    ]


def test_of_two_copies_both_are_named():
    ranks = [[(HALVES[0], [C]), (BIAS, [A])], [(HALVES[1], [D]), (BIAS, [A])], [(HALVES[0], [D]), (BIAS, [A])]]
    assert compared(*ranks) == ["w differs between ranks 0 and 2"]


def test_states_count_and_may_not_be_exchanged():
    assert compared([(BIAS, [A, B])], [(BIAS, [A, B])]) == []
    assert compared([(BIAS, [A, B])], [(BIAS, [A, A])]) == ["bias differs between ranks 0 and 1"]
    assert compared([(BIAS, [A, B])], [(BIAS, [B, A])]) == ["bias differs between ranks 0 and 1"]


def test_parts_of_other_places_and_empty_parts_are_not_compared():
    empty = cut(whole("w", (1, 2)), [Cut(0, 2, 1)])
    nothing = torch.empty(0, 2)
    assert compared([(HALVES[0], [C])], [(HALVES[1], [D])], [(empty, [nothing])], [(empty, [nothing])]) == []
