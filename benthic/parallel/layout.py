"""Which process does what: ranks, their places on the axes of a run, and who forms a group with whom.

Pure arithmetic. The axes, slowest first, are pipeline, replicate, shard and expert: the ranks of an expert group,
which exchange the most, are neighbours and so share a node. All but pipeline are data axes, on each place of which
other rows of the batch are read. Weights that are not an expert's are divided over shard x expert and copied over
replicate; the experts are divided over expert, then over shard.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from math import prod
from typing import Literal, Self

from benthic.config.schema import ParallelConfig

Axis = Literal["pipeline", "replicate", "shard", "expert"]
AXES: tuple[Axis, ...] = ("pipeline", "replicate", "shard", "expert")
DATA_AXES = AXES[1:]
SHARDED_AXES = AXES[2:]
"""Over which weights that are not an expert's are divided."""


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on each axis, from 0."""

    pipeline: int = 0
    replicate: int = 0
    shard: int = 0
    expert: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    pipeline: int = 1
    expert: int = 1
    shard: int = 1
    replicate: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Self:
        """As set."""
        return cls(parallel.pipeline, parallel.expert, parallel.shard, parallel.replicate)

    @property
    def world(self) -> int:
        """Processes."""
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of :data:`AXES`."""
        return self.pipeline, self.replicate, self.shard, self.expert

    def size(self, axes: Iterable[Axis]) -> int:
        """Ranks of a group along these axes."""
        return prod(getattr(self, axis) for axis in axes)

    @property
    def data_ranks(self) -> int:
        """Shares that a batch is divided into."""
        return self.size(DATA_AXES)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        places = []
        for size in reversed(self.sizes):
            rank, place = divmod(rank, size)
            places.append(place)
        return Coordinates(*reversed(places))

    def rank(self, coordinates: Coordinates) -> int:
        """Who stands there."""
        rank = 0
        for size, place in zip(self.sizes, astuple(coordinates), strict=True):
            rank = rank * size + place
        return rank

    def data_rank(self, rank: int) -> int:
        """Which share of the batch a rank works on; the ranks of a pipeline work on the same."""
        return rank % self.data_ranks

    def group(self, rank: int, axes: Sequence[Axis]) -> tuple[int, ...]:
        """The ranks that differ from this one along these axes only, itself among them, in ascending order."""
        here = self.coordinates(rank)
        fixed = [axis for axis in AXES if axis not in axes]
        return tuple(
            other
            for other in range(self.world)
            if all(getattr(self.coordinates(other), axis) == getattr(here, axis) for axis in fixed)
        )

    def groups(self, axes: Sequence[Axis]) -> list[tuple[int, ...]]:
        """All groups along these axes, each once, by their first rank."""
        return sorted({self.group(rank, axes) for rank in range(self.world)})


def chunk(rows: range, parts: int, number: int) -> range:
    """One of so many parts of consecutive rows, cut as ``torch.chunk`` does: the last ones may be smaller, or empty."""
    size = -(-len(rows) // parts)
    return rows[number * size : (number + 1) * size]


def rows_of_rank(batch: int, ranks: int, rank: int, micro_batch: int) -> range:
    """The rows of a batch that a data rank reads, in passes of at most ``micro_batch``.

    Where there are passes for all ranks, they are those that one process would make, each wholly on one rank.
    """
    whole = -(-batch // micro_batch)
    if whole >= ranks:
        return range(*(min(batch, micro_batch * (whole * end // ranks)) for end in (rank, rank + 1)))
    return range(batch * rank // ranks, batch * (rank + 1) // ranks)


def passes_of_ranks(batch: int, ranks: int, micro_batch: int) -> int:
    """How many passes every rank makes; some make an empty one where rows do not suffice for all."""
    return -(-batch // (micro_batch * ranks))
