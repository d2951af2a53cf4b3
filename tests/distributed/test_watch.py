"""Processes that are really stopped: noticed by the others, named, and every process says where it was."""

import os
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from processes import ProcessFailed, run_processes

from benthic.parallel.board import Board
from benthic.parallel.watch import Watch

TIMEOUT = 8.0


def work_until_stopped(rank: int, folder: str, stopped: int | None, seconds: float) -> float:
    """Steps of a collective each; one rank is stopped in the middle of them."""
    store = dist.distributed_c10d._get_default_store()
    board = Board(store, rank, dist.get_world_size()).another("watch")
    start, total = time.monotonic(), torch.zeros(1)
    with Watch(board, TIMEOUT, Path(folder)):
        while True:
            total += 1
            going_on = torch.tensor([float(time.monotonic() - start < seconds)])
            dist.all_reduce(going_on, dist.ReduceOp.MIN)
            if not going_on:
                return float(total)
            if rank == stopped and time.monotonic() - start > 3:
                Path(folder, "stopped-at").write_text(str(time.time()))
                stopped = None
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.01)


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_process_is_named_with_the_stacks_of_all(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 30.0)  # the last one leaves seconds after the first
    with pytest.raises(ProcessFailed) as caught:
        run_processes(work_until_stopped, 3, str(tmp_path), stopped, 60.0, timeout=90)
    said = str(caught.value)
    assert "[3, 3, 3]" in said
    at = float((tmp_path / "stopped-at").read_text())
    for rank in range(3):
        stacks = tmp_path / f"stacks-{rank}.txt"
        assert "work_until_stopped" in stacks.read_text()
        if rank != stopped:
            assert f"rank {rank}: no sign of life of rank {stopped}" in said
            assert stacks.stat().st_mtime - at < TIMEOUT


def test_nothing_happens_to_processes_that_live(tmp_path):
    steps = run_processes(work_until_stopped, 3, str(tmp_path), None, 10.0, timeout=90)
    assert len(set(steps)) == 1
    assert steps[0] > 10
    assert not list(tmp_path.iterdir())
