"""A store for one attempt of a run: torchrun starts processes again on the store that those before have written to.

What is left there, such as the addresses at which the dead had listened, is taken for that of the living. How often
torchrun has begun is not known alike on all nodes, so the processes agree on a name for their attempt: rank 0 makes one
up, and publishes it with a number that each process has drawn, until each has seen its own.
"""

import time
import uuid
from typing import Any

from benthic.parallel.board import Board, NoAnswer

_PAUSE_SECONDS = 0.02


def fresh_store(store: Any, rank: int, world: int, timeout_seconds: float) -> Any:
    """A part of torch.distributed's store that no earlier attempt has written to; the same on all ranks.

    Raises NoAnswer if some rank does not come in time.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    board = Board(PrefixStore("attempts", store), rank, world, timeout_seconds=timeout_seconds)
    drawn, end = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    board.post(_drawn_by(rank), drawn)
    agree = _lead if rank == 0 else _follow
    while (name := agree(board, drawn)) is None:
        if time.monotonic() > end:
            raise NoAnswer(f"not all of {world} processes have come within {timeout_seconds:g} s")
        time.sleep(_PAUSE_SECONDS)
    return PrefixStore(name, store)


def _lead(board: Board, name: str) -> str | None:
    """Publish whom rank 0 sees now, who may be of an earlier attempt still; the name, once all have answered to it."""
    drawn = [board.read(_drawn_by(rank)) for rank in range(board.world)]
    board.post("attempt", {"name": name, "drawn": drawn})
    return name if all(board.has(f"{name}-{rank}") for rank in range(1, board.world)) else None


def _follow(board: Board, drawn: str) -> str | None:
    """Answer if rank 0 has seen this process."""
    attempt = board.read("attempt")
    if drawn not in attempt["drawn"]:
        return None
    board.post(f"{attempt['name']}-{board.rank}", True)
    name: str = attempt["name"]
    return name


def _drawn_by(rank: int) -> str:
    return f"drawn-{rank}"
