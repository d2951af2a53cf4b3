"""A run of several processes, which torchrun has started: what they divide among them and what they agree on."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from benthic.config.schema import ParallelConfig
from benthic.errors import InputError, WorkFailed
from benthic.parallel import gather, messages
from benthic.parallel.attempt import fresh_store
from benthic.parallel.board import Board
from benthic.parallel.dispatch import Sender
from benthic.parallel.experts import divide_experts
from benthic.parallel.hash import CopiesDiffer, differences, hashes_of
from benthic.parallel.layout import Layout, passes_of_ranks, rows_of_rank
from benthic.parallel.mesh import Mesh
from benthic.parallel.pieces import Holding, piece_from_json, pieces_of
from benthic.parallel.shard import gathered, materialise, reduce_in_pass, shard
from benthic.parallel.traffic import Traffic
from benthic.parallel.turns import Turns
from benthic.parallel.watch import Watch
from benthic.parallel.world import Stop, Tensors, World
from benthic.precision.compute import Compute

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

_BOARDS = count()
"""Numbers of boards, in the order in which all processes make them."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ERRORS: dict[str, type[Exception]] = {"input": InputError, "work": WorkFailed}


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """The group of all processes, unless it is there already."""
    if dist.is_initialized():
        yield
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store = fresh_store(store, rank, world, timeout_seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Group(World):
    """One of several processes."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.layout = Layout.of(parallel)
        self.rank = dist.get_rank()
        self.main = self.rank == 0
        self.processes = self.layout.world
        self.mesh = Mesh(self.layout)
        self.traffic = Traffic()
        self._turns = Turns()
        self._parallel = parallel
        self._stop: Stop | None = None
        self._stopped_by: int | None = None

    def spread(self, objective: nn.Module, compute: Compute, length: int) -> None:
        """Layers by the pipeline, experts by the expert axis, then all weights by the others."""
        if self._parallel.pipeline > 1:
            from benthic.parallel.pipeline import divide_layers  # takes a while

            divide_layers(
                objective,
                self._parallel.schedule,
                self.mesh.pipeline_group,
                length=length,
                counts=self._parallel.layers,
                turns=self._turns if self._parallel.expert > 1 else None,
            )
        if self._parallel.expert > 1:
            sender = Sender(self.mesh.expert_group, self.traffic, self._turns)
            divide_experts(objective, sender, fp8=self._parallel.fp8_dispatch)
        shard(objective, self.mesh, self._parallel.zero, compute, self.traffic)

    def materialise(self, objective: nn.Module) -> None:
        """As :func:`benthic.parallel.shard.materialise`."""
        materialise(objective, "cpu")

    def rows(self, batch: int, micro_batch: int) -> range:
        """As :func:`rows_of_rank`."""
        return rows_of_rank(batch, self.layout.data_ranks, self.layout.data_rank(self.rank), micro_batch)

    def passes(self, batch: int, micro_batch: int) -> int:
        """As :func:`passes_of_ranks`."""
        return passes_of_ranks(batch, self.layout.data_ranks, micro_batch)

    def begin_pass(self, objective: nn.Module, *, last: bool) -> None:
        """ZeRO-1 reduces gradients once."""
        reduce_in_pass(objective, self._parallel.zero, last=last)

    def total(self, numbers: Tensor) -> Tensor:
        """One message."""
        total = numbers.clone()
        dist.all_reduce(total, group=self.mesh.data_group)
        return total

    def agree(self, losses: Tensor, grad_norm: Tensor, load_ME: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One message for all of them and for whether a process was asked to stop.

        What is not finite on one process is so on all. Loads are counts, which float64 adds exactly.
        """
        asked = torch.tensor([float(self._stop is not None and self._stop.signal == number) for number in _SIGNALS])
        # Each part of a gradient is there once for every copy of the model.
        square = grad_norm.double().square() / self.layout.replicate
        parts = [losses.double(), square[None], asked.double(), load_ME.double().flatten()]
        numbers = torch.cat(parts)
        dist.all_reduce(numbers)
        totals, square, asked, loads = numbers.split([len(part) for part in parts])
        self._stopped_by = next((number for number, one in zip(_SIGNALS, asked.tolist(), strict=True) if one), None)
        return totals.to(losses.dtype), square[0].sqrt().to(grad_norm.dtype), loads.round().long().view(load_ME.shape)

    def stopped_by(self, stop: Stop) -> int | None:
        """What all processes knew at the last :meth:`agree`."""
        return self._stopped_by

    def listen(self, stop: Stop) -> None:
        """From the next :meth:`agree` on."""
        self._stop = stop

    def evaluating(self, objective: nn.Module, compute: Compute) -> AbstractContextManager[None]:
        """As :func:`gathered`."""
        return gathered(objective, compute)

    def share(self, items: Iterable[_Item]) -> Iterator[tuple[_Item, bool]]:
        """In turns; in the last one, ranks that have none left get one that does not count."""
        ranks, rank = self.layout.data_ranks, self.layout.data_rank(self.rank)
        remaining = iter(items)
        while turn := list(islice(remaining, ranks)):
            yield (turn[rank], True) if rank < len(turn) else (turn[0], False)

    def first(self, function: Callable[[], _Answer]) -> _Answer:
        """On the main process; its answer, or the line of its error, goes to all."""
        answer: Any = None
        raised: Exception | None = None
        if self.main:
            try:
                answer = {"answer": function()}
            except tuple(_ERRORS.values()) as error:
                answer, raised = {_kind(error): str(error)}, error
        found = messages.broadcast(answer)
        if raised is not None:
            raise raised
        _raise_first([found])
        result: _Answer = found["answer"]
        return result

    def whole(self, model: nn.Module, tensors: Tensors) -> Tensors:
        """Sent to the main process by those that hold a part."""
        parts = gather.divided(model, self.layout)
        return {group: gather.whole(named, parts, self.layout, self.rank) for group, named in sorted(tensors.items())}

    def holdings(self, model: nn.Module) -> list[Holding]:
        """Each tells the others."""
        found = messages.gather(pieces_of(model, self.layout.expert, self.layout.coordinates(self.rank).expert))
        return [{piece.name: piece for piece in map(piece_from_json, pieces)} for pieces in found]

    def board(self) -> Board:
        """In torch.distributed's store."""
        store = dist.distributed_c10d._get_default_store()
        board = Board(store, self.rank, self.processes, timeout_seconds=self._parallel.timeout_seconds)
        return board.another(f"board-{next(_BOARDS)}")

    def any(self, flag: bool) -> bool:
        """One small message."""
        found = torch.tensor([float(flag)])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def together(self, function: Callable[[], _Answer]) -> _Answer:
        """Each tells the others how it ended."""
        answer: Any = None
        raised: Exception | None = None
        said: dict[str, str] = {}
        try:
            answer = function()
        except tuple(_ERRORS.values()) as error:
            said, raised = {_kind(error): str(error)}, error
        ends = messages.gather(said)
        if raised is not None:
            raise raised
        _raise_first(ends)
        result: _Answer = answer
        return result

    def watched(self, out: Path) -> AbstractContextManager[Any]:
        """By a thread of each."""
        return Watch(self.board(), self._parallel.timeout_seconds, out)

    def compare(self, tensors: Tensors, holdings: Sequence[Holding]) -> None:
        """By a hash of each parameter with all that belongs to it."""
        found = differences(holdings, messages.gather_numbers(hashes_of(tensors, holdings, self.rank)))
        if found:
            raise CopiesDiffer(f"{found[0]}: a fault of the memory there?" + _and_more(len(found) - 1))

    def figures(self) -> dict[str, Any]:
        """Bytes that this process has sent, by purpose."""
        return {"bytes_sent": self.traffic.take()}


def _kind(error: Exception) -> str:
    return next(name for name, one in _ERRORS.items() if isinstance(error, one))


def _raise_first(ends: Iterable[dict[str, Any]]) -> None:
    """Raise what one of them ended with, if any did."""
    for end in ends:
        for kind, failure in _ERRORS.items():
            if kind in end:
                raise failure(end[kind])


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""
