"""Ctrl-C and SIGTERM as requests: the step in progress ends, a checkpoint is saved, then the program stops."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupted(SystemExit):
    """Training was stopped by a signal after saving; the exit status is the shell's, 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM in :attr:`signal`; a second one acts at once.

    Only a program's main thread receives signals; elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
