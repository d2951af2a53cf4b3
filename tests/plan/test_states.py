"""What ZeRO's three steps leave on a rank, and have it send, in numbers small enough to count."""

import pytest

from benthic.plan.states import Unit, state_memory, state_messages

# 10 numbers on 4 ranks: 3, 3, 3, 1.
BLOCK = Unit(whole=10, held=3, optimizer_bytes=28, padded=12, ranks=4, copies=1, gathered_bytes=2)
OTHER = Unit(whole=6, held=2, optimizer_bytes=20, padded=8, ranks=4, copies=1, gathered_bytes=2)
ROOT = Unit(whole=20, held=5, optimizer_bytes=44, padded=20, ranks=4, copies=1, gathered_bytes=4, stays=True)
ALONE = Unit(whole=7, held=7, optimizer_bytes=60, padded=7, ranks=1, copies=1, gathered_bytes=0)


def test_zero_1_keeps_weights_and_gradients_whole():
    memory = state_memory([BLOCK, OTHER, ROOT, ALONE], zero=1, average=True)
    assert memory.weights == memory.average == 4 * (3 + 2 + 5 + 7)
    assert memory.optimizer == 28 + 20 + 44 + 60
    assert memory.gathered == 2 * 10 + 2 * 6 + 4 * 20
    assert memory.gradients == 4 * (10 + 6 + 20 + 7)
    assert memory.messages == 4 * 20


def test_zero_2_divides_gradients():
    memory = state_memory([BLOCK, OTHER, ROOT, ALONE], zero=2, average=False)
    assert memory.average == 0
    assert memory.gathered == 2 * 10 + 2 * 6 + 4 * 20
    # Of the unit that is at work, whole; of what is never divided, whole.
    assert memory.gradients == 4 * (3 + 2 + 5 + 20 + 7)


def test_zero_3_divides_weights_but_what_stays():
    memory = state_memory([BLOCK, OTHER, ROOT, ALONE], zero=3, average=False)
    assert memory.gathered == 4 * 20 + 2 * (2 * 10)
    assert memory.gradients == 4 * (3 + 2 + 5 + 20 + 7)


def test_a_model_on_one_rank_has_one_of_each():
    memory = state_memory([ALONE], zero=1, average=False)
    assert (memory.weights, memory.gathered, memory.gradients, memory.messages) == (28, 0, 28, 0)
    assert state_messages([ALONE], zero=1, passes=5) == (0, 0, 0)


@pytest.mark.parametrize(("zero", "gatherings", "sums"), [(1, 1, 1), (2, 5, 5), (3, 10, 5)])
def test_messages_of_five_passes(zero, gatherings, sums):
    sent = state_messages([BLOCK, ALONE], zero=zero, passes=5)
    # Each rank sends its 3 numbers on three times in all; of gradients as many, in fp32.
    assert sent.weights == pytest.approx(gatherings * 3 * 3 * 2)
    assert sent.gradients == pytest.approx(sums * 3 * 3 * 4)
    assert sent.copies == 0
    kept = state_messages([BLOCK._replace(stays=True)], zero=zero, passes=5)
    assert kept.weights == pytest.approx(min(gatherings, 5) * 3 * 3 * 2)


def test_copies_sum_up_their_share():
    sent = state_messages([BLOCK._replace(copies=3)], zero=1, passes=5)
    assert sent.copies == pytest.approx(2 * 3 * 4 * 2 / 3)
