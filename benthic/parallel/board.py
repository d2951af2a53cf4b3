"""A notice board for all ranks of a run: short messages in torch.distributed's store, away from its collectives.

Threads beside the training use it: one that writes checkpoints, one that watches. A collective of theirs could come
between those of a step in another order on another rank; a message cannot. Messages are JSON and never unpickled.
"""

import json
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from benthic.errors import WorkFailed


class NoAnswer(WorkFailed):
    """A rank has not said what others wait for."""


class Board:
    """One rank's view of the board.

    A thread needs a board of its own (:meth:`another`): when the store does not answer, all wait that share a
    connection.
    """

    def __init__(self, store: Any, rank: int, world: int, *, timeout_seconds: float = 1800) -> None:
        """``store`` is torch.distributed's; ``timeout_seconds`` how long messages are waited for."""
        self.rank, self.world = rank, world
        self._store, self._timeout = store, timeout_seconds
        self._given_up = threading.Event()

    def another(self, prefix: str) -> "Board":
        """A board apart from this one, with a connection of its own."""
        from torch.distributed.distributed_c10d import PrefixStore

        return Board(PrefixStore(prefix, self._store.clone()), self.rank, self.world, timeout_seconds=self._timeout)

    def post(self, key: str, message: Any) -> None:
        """Put up what others may read, in the place of what is there under this key."""
        self._store.set(key, json.dumps(message))

    def read(self, key: str) -> Any:
        """What is there under a key, as soon as it is. Raises NoAnswer if that takes too long."""
        start = time.monotonic()
        pause = 0.002
        while not self.has(key):
            if time.monotonic() - start > self._timeout:
                raise NoAnswer(f"nothing heard of {key} within {self._timeout:g} s")
            if self._given_up.wait(pause):
                raise NoAnswer(f"nothing heard of {key} before this process ended")
            pause = min(2 * pause, 0.25)
        return json.loads(self._store.get(key))

    def give_up(self) -> None:
        """Let nobody in this process wait any longer."""
        self._given_up.set()

    def read_now(self, keys: Sequence[str]) -> list[Any]:
        """What is there under keys of which all are."""
        return [json.loads(message) for message in self._store.multi_get(list(keys))] if keys else []

    def has(self, key: str) -> bool:
        """Whether anything is there under a key."""
        return bool(self._store.check([key]))

    def remove(self, keys: Iterable[str]) -> None:
        """Take down what everybody concerned has read."""
        for key in keys:
            self._store.delete_key(key)
