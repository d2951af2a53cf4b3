"""Two passes in turns: while the messages of one are on their way, the other computes.

This is how a forward and a backward pass that DualPipeV pairs hide each other's all-to-all (V3 report section 3.2.1).
Only one of the two runs at a time, and each hands over where it has begun to send: so the order in which messages begin
is the same on all ranks that exchange them, and results are those of one pass after the other, bit for bit.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Event


class Turns:
    """Runs two passes of one rank at a time."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: Event | None = None
        """What the pass that does not run waits for, while both are under way."""

    def hand_over(self) -> None:
        """Let the other pass run until it hands over or ends; at once if there is none.

        It does not matter in which thread: autograd may call it in one of its own.
        """
        other = self._waiting
        if other is None:
            return
        mine = self._waiting = Event()
        other.set()
        mine.wait()

    def run(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Both, to their ends; raises what the first raised, or else the second."""
        self._worker = self._worker or ThreadPoolExecutor(1, "second-pass")
        begin = self._waiting = Event()
        context = copy_context()
        future = self._worker.submit(context.run, self._from, begin, second)
        try:
            first()
        finally:
            self._end()
            error = future.exception()
        if error is not None:
            raise error

    def _from(self, begin: Event, second: Callable[[], None]) -> None:
        begin.wait()
        try:
            second()
        finally:
            self._end()

    def _end(self) -> None:
        other, self._waiting = self._waiting, None
        if other is not None:
            other.set()
