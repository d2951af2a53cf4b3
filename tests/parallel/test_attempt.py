"""Attempts of a run on one store: processes of the same attempt find one another, and none of an earlier one."""

import random
import time

import pytest
import torch.distributed as dist
from boards import on_ranks

from benthic.parallel.attempt import fresh_store
from benthic.parallel.board import NoAnswer


def comes_late(board, seed: int, timeout: float = 20):
    time.sleep(random.Random(f"{seed} {board.rank}").uniform(0, 0.3))
    mine = fresh_store(board._store, board.rank, board.world, timeout)
    stale = mine.check(["address-0"])
    mine.set(f"address-{board.rank}", "here")
    mine.wait([f"address-{rank}" for rank in range(board.world)])
    return stale


@pytest.mark.parametrize("worlds", [(1, 1), (4, 4, 4), (4, 2, 3)])
def test_each_attempt_begins_with_nothing(worlds):
    store = dist.HashStore()
    for attempt, world in enumerate(worlds):
        stale = on_ranks(world, lambda board, seed=attempt: comes_late(board, seed), store=store)
        assert stale[0] is False, "what rank 0 is yet to write is there"
        assert all(isinstance(one, bool) for one in stale)


def test_an_attempt_whose_processes_died_on_the_way_does_not_count():
    store = dist.HashStore()

    def some_die(board):
        return None if board.rank == 2 else fresh_store(board._store, board.rank, board.world, 0.5)

    ends = on_ranks(3, some_die, 0.5, store=store)
    assert isinstance(ends[0], NoAnswer)
    assert on_ranks(3, lambda board: comes_late(board, 0), store=store) is not None


def test_the_name_is_one_for_all():
    def named(board):
        mine = fresh_store(board._store, board.rank, board.world, 20)
        total = mine.add("total", 1)
        while mine.add("total", 0) < board.world:
            time.sleep(0.01)
        return total

    store = dist.HashStore()
    for _ in range(5):
        assert sorted(on_ranks(5, named, store=store)) == [1, 2, 3, 4, 5]
