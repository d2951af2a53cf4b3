"""Checkpoints written while training goes on: a step waits for a copy in memory, not for hashes and disks."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from benthic.train.checkpoint import Checkpoint, save
from benthic.train.joint import JointSaves
from benthic.train.shares import Shares

_GRACE_SECONDS = 10.0
"""For a write by all ranks to end when this rank ends with an error."""


class Together(NamedTuple):
    """What a rank needs to write checkpoints with the others."""

    shares: Shares
    saves: JointSaves
    any: Callable[[bool], bool]
    """Whether it is so on any rank; all ask together."""


class BackgroundWriter:
    """Commits checkpoints below ``root`` in a thread of its own, one at a time. Leaving its context waits for it.

    A failed write is raised by the next call of :meth:`save`, :meth:`check` or :meth:`wait`, as CheckpointFailed.
    """

    def __init__(self, root: Path, together: Together | None = None) -> None:
        """``together`` is given where all ranks of a run write each checkpoint; each calls the same methods then."""
        self._root, self._together = root, together
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=self._begin)
        self._clock: int | None = None
        self._writing: Future[Path] | None = None

    def save(self, step: int, checkpoint: Checkpoint, keep: int | None) -> None:
        """Copy the checkpoint, once the one before is on disk, and begin to write the copy."""
        self.wait()
        self._writing = self._thread.submit(self._committing(step, checkpoint, keep))

    def _committing(self, step: int, checkpoint: Checkpoint, keep: int | None) -> Callable[[], Path]:
        """What is left to do once the checkpoint is copied."""
        if self._together is None:
            copied = on_host(checkpoint)
            return lambda: save(self._root, step, copied, keep)
        saves, owned = self._together.saves, self._together.shares.owned(checkpoint)
        mine = {
            group: {name: (piece, _copy(tensor)) for name, (piece, tensor) in tensors.items()}
            for group, tensors in owned.items()
        }
        return lambda: saves.save(self._root, step, mine, checkpoint.state, keep)

    @property
    def failed(self) -> bool:
        """Whether :meth:`check` would raise."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def check(self) -> None:
        """Raise what the write in the background failed with, if it has."""
        failed = self.failed
        if failed if self._together is None else self._together.any(failed):
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def processor_seconds(self) -> float:
        """Processor time of its thread so far: part of the process's, but not of training's.

        0 where a thread has no clock that others can read, such as on macOS.
        """
        return 0.0 if self._clock is None else time.clock_gettime(self._clock)

    def _begin(self) -> None:
        """In the new thread, before it writes anything."""
        give_way_to_training()
        if sys.platform == "linux":
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None and self._together is not None:
            # Other ranks may be no more; but if all end alike, the checkpoint is soon there.
            if self._writing is not None:
                wait([self._writing], _GRACE_SECONDS)
            self._together.saves.give_up()
        self._thread.shutdown()
        self._clock = None  # of a thread that is no more


def give_way_to_training() -> None:
    """Give the calling thread the least priority, where threads have one of their own.

    Each thread of a step waits for the slowest at every operation: one that shares its core delays them all.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def on_host(checkpoint: Checkpoint) -> Checkpoint:
    """A copy in host memory that no later step changes."""
    return Checkpoint(
        {
            group: {name: _copy(tensor) for name, tensor in tensors.items()}
            for group, tensors in checkpoint.tensors.items()
        },
        checkpoint.state,
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
