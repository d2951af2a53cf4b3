"""The helper that runs a function in several processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import ProcessFailed, run_processes


def total(rank, start):
    number = torch.tensor([start + rank])
    dist.all_reduce(number)
    return rank, int(number), torch.get_num_threads()


def fails_on_one(rank):
    if rank == 1:
        raise ValueError("of rank one")
    dist.barrier()


def hangs(rank):
    if rank == 0:
        time.sleep(600)


def its_pid(rank):
    return os.getpid()


def test_every_rank_returns_what_it_computed():
    assert run_processes(total, 3, 10) == [(rank, 33, 1) for rank in range(3)]


def test_a_rank_that_raises_is_told_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"(?s)rank 1:.*ValueError: of rank one"):
        run_processes(fails_on_one, 2, timeout=60)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_is_killed():
    with pytest.raises(ProcessFailed, match="None"):
        run_processes(hangs, 2, timeout=3)


def test_nothing_is_left_behind():
    for pid in run_processes(its_pid, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
