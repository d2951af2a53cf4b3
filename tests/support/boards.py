"""Ranks as threads of one process: what needs messages between them, and nothing else of torch.distributed."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from benthic.parallel.board import Board


def on_ranks(world: int, function: Callable[[Board], Any], timeout_seconds: float = 10, store: Any = None) -> list[Any]:
    """``function(board)`` on each rank; what each returned, or the exception that ended it, by rank."""
    store, found = store or dist.HashStore(), [None] * world

    def run(rank: int) -> None:
        try:
            found[rank] = function(Board(store, rank, world, timeout_seconds=timeout_seconds))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), f"{thread.name} does not end"
    return found


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
