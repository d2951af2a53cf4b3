"""Two passes in turns: while the messages of one are on their way, the other computes.

This is how a forward and a backward pass that DualPipeV pairs hide each other's all-to-all (V3 report section 3.2.1).
Only one of the two runs at a time, and each hands over where it has begun to send: so messages begin in the same order
on all ranks that exchange them, and results are those of one pass after the other, bit for bit.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch


class Turns:
    """Runs two passes of one rank at a time.

    Nothing here needs a lock: only the pass whose turn it is touches it.
    """

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: Event | None = None
        """What the pass that does not run waits for, while both are under way."""
        self._raised: BaseException | None = None

    def hand_over(self) -> None:
        """Let the other pass run until it hands over or ends; at once if there is none.

        It does not matter in which thread: autograd may call it in one of its own. If the other pass has raised, this
        one goes no further: its messages would no longer meet those of other ranks.
        """
        other = self._waiting
        if other is not None:
            mine = self._waiting = Event()
            other.set()
            mine.wait()
        if self._raised is not None:
            raise _Abandoned

    def run(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Both, to their ends, the second in a thread of its own; or as far as one raises, which comes out here.

        Of the calling thread, the other has the number of threads that PyTorch computes with, and nothing else.
        """
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "second-pass", torch.set_num_threads, (torch.get_num_threads(),))
        begin = Event()
        future = self._worker.submit(self._run_second, begin, second)
        self._waiting = begin
        self._to_its_end(first)
        future.result()
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def _run_second(self, begin: Event, second: Callable[[], None]) -> None:
        begin.wait()
        if self._raised is None:
            self._to_its_end(second)

    def _to_its_end(self, one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            # Raised again in the thread that asked for both.
            self._raised = self._raised or error
        other, self._waiting = self._waiting, None
        if other is not None:
            other.set()


class _Abandoned(Exception):
    """The other pass has raised."""
