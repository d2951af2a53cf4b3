"""Ranks that give signs of life, and notice when another gives none: a stopped process, a machine that is gone.

Collectives only say, after their timeout, that something did not come. Here each rank puts a beat on the board from a
thread of its own. Rank 0 watches all of them and the others watch rank 0, so that it costs a few messages a rank. When
one is silent for too long, rank 0 (or, of rank 0, all others) says so on the board. Every rank then names the silent
ones, writes down where each of its threads is, wakes silent ones of its machine so that they do the same, and ends
with a status of its own, which has torchrun start all of them again.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benthic.parallel.board import Board

RANK_LOST = 3
"""Exit status of ranks that have waited for another in vain."""
_NOTICED = 0.75
"""Share of the timeout after which a silence counts, so that all know within the timeout."""
_LOST = "lost"
_LEAVES = -1
"""Instead of a beat's number, the last one: the silence to come is none."""
_BEATS = 16
"""In a timeout."""
_GRACE_SECONDS = 2.0
"""For a rank that is awake again to write down where it was, once it knows."""


class Watch:
    """While entered, gives this rank's signs of life and ends the process if another rank gives none.

    A silence counts from when this rank last saw it broken, by its own clock. A rank that was itself stopped for a
    while knows nothing of the others, and begins anew.
    """

    def __init__(
        self, board: Board, timeout_seconds: float, folder: Path, leave: Callable[[int], Any] = os._exit
    ) -> None:
        """``board`` is for this alone; stacks go to ``folder/stacks-R.txt``; ``leave`` ends the process."""
        self._board, self._folder, self._leave = board, folder, leave
        self._limit, self._interval = _NOTICED * timeout_seconds, min(timeout_seconds / _BEATS, 5.0)
        self._watched = [r for r in range(board.world) if r != board.rank] if board.rank == 0 else [0]
        self._over = threading.Event()
        self._found: dict[str, Any] | None = None
        """Which ranks are lost, once this one ends because of them."""
        self._beats: dict[int, dict[str, Any]] = {}
        """The last of each rank that is watched."""
        self._threads = [
            threading.Thread(target=target, name=f"watch-{target.__name__[1:]}", daemon=True)
            for target in (self._beat, self._wait_for_answers)
        ]

    def __enter__(self) -> Self:
        now = time.monotonic()
        self._heard = dict.fromkeys(self._watched, now)
        self._answered = self._judged = now
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:  # maybe because a lost rank, or another that knows of it, has ended first
            if self._found is None:
                with suppress(RuntimeError):
                    self._judge()
            if self._found is not None:
                threading.Event().wait()  # for the thread that is about to end the process
        self._over.set()
        # The first says that this rank leaves. A thread that is in the store when Python ends would abort the process.
        for thread in self._threads:
            thread.join(self._limit)

    def _beat(self) -> None:
        """Speak, listen and judge, over and over. The board may keep this thread waiting: the other one counts that."""
        number = 0
        with suppress(RuntimeError):  # a board that is gone does not answer, which the other thread notices
            while not self._over.is_set():
                number += 1
                self._post(number)
                self._listen()
                self._judge()
                self._answered = time.monotonic()
                self._over.wait(self._interval)
            self._post(_LEAVES)

    def _post(self, number: int) -> None:
        beat = {"number": number, "pid": os.getpid(), "host": socket.gethostname()}
        self._board.post(_beat_of(self._board.rank), beat)

    def _listen(self) -> None:
        there = [rank for rank in self._watched if rank in self._beats or self._board.has(_beat_of(rank))]
        for rank, beat in zip(there, self._board.read_now([_beat_of(rank) for rank in there]), strict=True):
            if self._beats.get(rank) != beat:
                self._beats[rank], self._heard[rank] = beat, time.monotonic()

    def _judge(self) -> None:
        """End if the board says that ranks are lost, or say so if it is seen here."""
        now = time.monotonic()
        if now - self._judged > self._limit / 2:  # this rank was stopped itself
            self._heard = dict.fromkeys(self._watched, now)
        self._judged = now
        silent = [rank for rank in self._watched if now - self._heard[rank] > self._limit and not self._has_left(rank)]
        if self._found is not None:  # by the other thread, when the board did not answer; now it does
            self._board.post(_LOST, self._found)
        elif self._board.has(_LOST):
            self._end(self._board.read(_LOST))
        elif silent:
            named = ", ".join(map(self._describe, silent))
            lost = {"beats": [self._beats.get(rank, {}) for rank in silent], "why": f"no sign of life of {named}"}
            self._board.post(_LOST, lost)
            self._end(lost)

    def _has_left(self, rank: int) -> bool:
        return rank in self._beats and self._beats[rank]["number"] == _LEAVES

    def _describe(self, rank: int) -> str:
        beat = self._beats.get(rank)
        who = f"process {beat['pid']} on {beat['host']}" if beat else "which has never given one"
        return f"rank {rank} ({who}) for {time.monotonic() - self._heard[rank]:.1f} s"

    def _wait_for_answers(self) -> None:
        """Notice when the board itself keeps silent: it is in the memory of rank 0, or of torchrun."""
        last = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            if now - last > self._limit / 2:  # this rank was stopped itself
                self._answered = now
            last = now
            if now - self._answered > self._limit and not self._has_left(0):
                why = f"no sign of life of {_keeper()} for {now - self._answered:.1f} s"
                self._end({"beats": [self._beats.get(0, {})], "why": why})

    def _end(self, lost: dict[str, Any]) -> None:
        """Tell, write down the stacks, wake the lost ones so that they do so too, and end the process."""
        self._found = lost
        path = self._folder / f"stacks-{self._board.rank}.txt"
        print(f"rank {self._board.rank}: {lost['why']}; where each thread is: {path}", file=sys.stderr, flush=True)
        with suppress(OSError), path.open("w", encoding="utf-8") as file:
            print(lost["why"], file=file, flush=True)
            faulthandler.dump_traceback(file)
        others = [beat for beat in lost["beats"] if beat.get("host") == socket.gethostname()]
        for beat in others:
            with suppress(OSError):
                os.kill(beat["pid"], signal.SIGCONT)  # harmless, should the number be another process's by now
        if others:
            time.sleep(2 * self._interval + _GRACE_SECONDS)
        self._leave(RANK_LOST)


def _beat_of(rank: int) -> str:
    return f"beat-{rank}"


def _keeper() -> str:
    """Who has the board in memory."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"torchrun on {os.environ.get('MASTER_ADDR')}"
    return "rank 0"
