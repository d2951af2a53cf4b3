"""Memory that the ranks of a group share where all run on one machine, so that one reads in place what another posts.

gloo sends through sockets there too, by the cores that compute, reduces whole messages on all ranks and copies them on
the way. Here each rank has a segment, which the others have mapped. They wait for one another through gloo, which also
notices that one is gone. A segment has no name that could be left behind: it is a file in memory, opened through /proc
of the process that made it, and gone with the last process that has it.
"""

import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benthic.parallel.messages import gather_numbers

_BYTES = 128 << 20
"""Of a segment, which takes memory as it is used. A message that is larger than half of it goes in pieces."""
_NAME = "benthic"


class Segments:
    """Collectives of a group through its ranks' segments. All ranks call the same ones in the same order.

    They post in either half of a segment in turn, and wait for one another in between: whoever posts in a half again
    knows that all have taken what it was, since they have come to wait for what is in the other half.
    """

    def __init__(self, group: dist.ProcessGroup, segments: list[mmap.mmap]) -> None:
        """``segments`` are in order of rank."""
        self._group, self._rank = group, group.rank()
        self._halves = [torch.frombuffer(segment, dtype=torch.uint8).view(2, -1) for segment in segments]
        self._turn = 0

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """``x`` (N) of all ranks, one after another, as ``out`` (ranks * N), of which ``x`` may be a part already."""
        out_RN = out.view(len(self._halves), -1)
        for part in self._pieces(x.numel(), x.element_size()):
            self._posted(self._rank, x[part]).copy_(x[part])
            dist.barrier(self._group)
            for rank in range(len(self._halves)):
                if rank != self._rank:
                    out_RN[rank, part].copy_(self._posted(rank, x[part]))
            self._turn += 1
        if out_RN[self._rank].data_ptr() != x.data_ptr():
            out_RN[self._rank].copy_(x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """This rank's part ``out`` (N) of the sum of all ranks' ``x`` (ranks * N), added in order of rank."""
        x_RN = x.view(len(self._halves), -1)
        for part in self._pieces(out.numel(), x.element_size() * len(x_RN)):
            piece_RN = x_RN[:, part]
            posted_RN = self._posted(self._rank, piece_RN)
            for rank in range(len(x_RN)):
                if rank != self._rank:
                    posted_RN[rank].copy_(piece_RN[rank])
            dist.barrier(self._group)
            first, second, *others = (
                (piece_RN if rank == self._rank else self._posted(rank, piece_RN))[self._rank]
                for rank in range(len(x_RN))
            )
            torch.add(first, second, out=out[part])
            for other in others:
                out[part].add_(other)
            self._turn += 1

    def _posted(self, rank: int, like: Tensor) -> Tensor:
        """What a rank posts this time, of this shape and dtype."""
        return self._halves[rank][self._turn % 2, : like.nbytes].view(like.dtype).view(like.shape)

    @staticmethod
    def _pieces(size: int, bytes_each: int) -> Iterator[slice]:
        room = _BYTES // 2 // bytes_each
        return (slice(start, min(start + room, size)) for start in range(0, size, room))


def segments_of(group: dist.ProcessGroup) -> Segments | None:
    """New ones, which all ranks make together; none for one rank, or unless every rank can map every other's."""
    if group.size() == 1:
        return None
    own, token = _create()
    try:
        made = gather_numbers(torch.tensor([os.getpid(), own, token]), group)
        segments = [segment for numbers in made if (segment := _mapped(*numbers.tolist())) is not None]
        all_mapped = all(gather_numbers(torch.tensor(len(segments) == len(made)), group))
    finally:
        if own >= 0:
            os.close(own)
    return Segments(group, segments) if all_mapped else None


def _create() -> tuple[int, int]:
    """A segment's file descriptor, below 0 where the system has no such thing, and the number that it begins with."""
    token = secrets.randbits(62)
    try:
        own = os.memfd_create(_NAME)
    except (AttributeError, OSError):
        return -1, token
    os.ftruncate(own, _BYTES)
    os.pwrite(own, token.to_bytes(8, "little"), 0)
    return own, token


def _mapped(pid: int, descriptor: int, token: int) -> mmap.mmap | None:
    """The segment of a process, unless it is on another machine, where the same numbers mean something else."""
    path = Path(f"/proc/{pid}/fd/{descriptor}")
    try:
        if not str(path.readlink()).startswith(f"/memfd:{_NAME}"):
            return None
        with path.open("r+b", buffering=0) as file:
            segment = mmap.mmap(file.fileno(), _BYTES)
    except (OSError, ValueError):
        return None
    return segment if int.from_bytes(segment[:8], "little") == token else None
