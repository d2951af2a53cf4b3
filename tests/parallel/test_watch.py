"""Watching ranks as threads: who is named when one falls silent, and that nobody is named without need."""

import time

import pytest
from boards import on_ranks

from benthic.parallel.board import Board
from benthic.parallel.watch import RANK_LOST, Watch

TIMEOUT = 1.6
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def watching(board: Board, folder, seconds: float, silent_after: float | None = None):
    """A rank that is there for so long; after a while its messages go nowhere. The status it left with, if it did."""
    left: list[int] = []

    def leave(status):
        left.append(status)
        raise SystemExit  # ends the thread

    watch = Watch(board, TIMEOUT, folder, leave)
    with watch:
        if silent_after is not None:
            time.sleep(silent_after)
            board.post = lambda *_: time.sleep(60)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not left:
            time.sleep(0.01)
    return left[0] if left else None


@pytest.mark.parametrize("silent", [1, 2])
def test_a_silent_rank_is_named_by_all_within_the_timeout(tmp_path, capfd, monkeypatch, silent):
    monkeypatch.setattr("benthic.parallel.watch._GRACE_SECONDS", 0.0)
    start = time.monotonic()
    ends = on_ranks(3, lambda board: watching(board, tmp_path, 8, 0.3 if board.rank == silent else None), 5)
    assert time.monotonic() - start < 8
    assert [end for rank, end in enumerate(ends) if rank != silent] == [RANK_LOST] * 2
    told = capfd.readouterr().err
    for rank in range(3):
        if rank != silent:
            assert f"rank {rank}: no sign of life of rank {silent} (process " in told
            assert "File " in (tmp_path / f"stacks-{rank}.txt").read_text()


def test_ranks_that_live_and_leave_at_their_own_times_are_not_named(tmp_path, capfd):
    assert on_ranks(3, lambda board: watching(board, tmp_path, 1 + board.rank), 5) == [None] * 3
    assert capfd.readouterr().err == ""


def test_a_rank_that_never_comes_is_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("benthic.parallel.watch._GRACE_SECONDS", 0.0)
    ends = on_ranks(3, lambda board: None if board.rank == 2 else watching(board, tmp_path, 8), 5)
    assert ends == [RANK_LOST, RANK_LOST, None]
    assert "no sign of life of rank 2 (which has never given one)" in capfd.readouterr().err
