"""Which part of which whole tensor a rank holds, as plain numbers: what a checkpoint says of every tensor in it.

A tensor reaches a rank by cuts, one after another: experts first between expert ranks, then rows between shards. Each
cut is torch.chunk's, so that the last parts may be smaller, or empty. What comes of it is a box in the whole tensor.
Names are those of the model in one process, whatever stage or rank holds them. Nothing here needs processes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from benthic.model.moe import Experts

Extent = tuple[int, ...]


class Box(NamedTuple):
    """Where a part of a tensor begins in each dimension, and how far it goes."""

    offset: Extent
    size: Extent

    @property
    def numel(self) -> int:
        """Elements in it; 1 of a scalar."""
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """It as an index of the tensor that it is a part of."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))

    def overlap(self, other: "Box") -> "Box":
        """What both have; of size 0 somewhere if that is nothing."""
        start = tuple(map(max, self.offset, other.offset))
        ends = zip(self.offset, self.size, other.offset, other.size, strict=True)
        stop = (min(a + m, b + n) for a, m, b, n in ends)
        return Box(start, tuple(max(0, end - begin) for begin, end in zip(start, stop, strict=True)))

    def within(self, other: "Box") -> "Box":
        """The same place counted from where ``other`` begins."""
        return self._replace(offset=tuple(a - b for a, b in zip(self.offset, other.offset, strict=True)))


class Piece(NamedTuple):
    """A part of a whole tensor of this name and shape."""

    name: str
    shape: Extent
    offset: Extent
    size: Extent

    @property
    def box(self) -> Box:
        """Its place alone."""
        return Box(self.offset, self.size)

    @property
    def start(self) -> int:
        """The place of its first number among the whole's. Raises ValueError unless it is whole rows."""
        if self.size[1:] != self.shape[1:]:
            raise ValueError(f"{self} is not whole rows")
        return self.offset[0] * math.prod(self.shape[1:]) if self.shape else 0


class Cut(NamedTuple):
    """A cut of one dimension into equal parts, rounded up, of which one is kept."""

    dim: int
    parts: int
    number: int
    """Of the part that is kept, from 0."""


def whole(name: str, shape: Iterable[int]) -> Piece:
    """All of a tensor."""
    shape = tuple(shape)
    return Piece(name, shape, (0,) * len(shape), shape)


def cut(piece: Piece, cuts: Iterable[Cut]) -> Piece:
    """What is left of a piece after these cuts, the first first."""
    offset, size = list(piece.offset), list(piece.size)
    for dim, parts, number in cuts:
        length = math.ceil(size[dim] / parts)
        start = min(number * length, size[dim])
        offset[dim] += start
        size[dim] = min(length, size[dim] - start)
    return piece._replace(offset=tuple(offset), size=tuple(size))


def cuts_of(placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]) -> list[Cut]:
    """A DTensor's placements as cuts, in the order in which they were made.

    FSDP2 shards what is already sharded by an inner dimension of the mesh, and then marks its own placement, which
    stands further out, as strided: it cuts last.
    """
    found: tuple[list[Cut], list[Cut]] = ([], [])
    for placement, parts, number in zip(placements, mesh, coordinate, strict=True):
        if placement.is_partial():
            raise ValueError(f"{placement} is a sum that is not taken yet, and no state of a run")
        if not placement.is_replicate():
            found[hasattr(placement, "split_factor")].append(Cut(placement.dim, parts, number))
    return [*found[0], *found[1]]


def piece_of(name: str, tensor: Tensor, before: Sequence[Cut] = ()) -> Piece:
    """What a rank holds of a tensor: of a DTensor by its placements, of any other all.

    Args:
        name: in the model of one process.
        tensor: as the rank has it.
        before: cuts into equal parts that the tensor does not know of, such as of experts between ranks; its own come
            after them.
    """
    shape = list(tensor.shape)
    for dim, parts, _ in before:
        shape[dim] *= parts
    return cut(whole(name, shape), [*before, *_own_cuts(tensor)])


def pieces_of(model: nn.Module, expert_ranks: int = 1, expert_rank: int = 0) -> list[Piece]:
    """What a rank holds of a model's parameters and buffers, by their own account; experts are divided before."""
    cuts = [Cut(0, expert_ranks, expert_rank)]
    experts = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }
    return [piece_of(name, tensor, cuts if name in experts else ()) for name, tensor in model.state_dict().items()]


def piece_from_json(values: Sequence[Any]) -> Piece:
    """A piece that has been through JSON, which knows no tuples."""
    name, *extents = values
    return Piece(name, *map(tuple, extents))


def _own_cuts(tensor: Tensor) -> list[Cut]:
    placements: Any = getattr(tensor, "placements", None)
    if placements is None:
        return []
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return cuts_of(placements, mesh.shape, mesh.get_coordinate())


Holding = Mapping[str, Piece]
"""What one rank holds, by name."""


def share_out(holdings: Sequence[Holding]) -> list[set[str]]:
    """The names whose piece each rank is to write, so that every piece is written once and each writes as little.

    Raises ValueError unless the pieces of every name make up the whole, without a gap or an overlap.
    """
    holders: dict[Piece, list[int]] = defaultdict(list)
    for rank, holding in enumerate(holdings):
        for piece in holding.values():
            if piece.box.numel or not math.prod(piece.shape):
                holders[piece].append(rank)
    _refuse_gaps(holders)
    owned: list[set[str]] = [set() for _ in holdings]
    written = [0] * len(holdings)
    for piece in sorted(holders, key=lambda piece: (-piece.box.numel, piece)):
        rank = min(holders[piece], key=lambda rank: (written[rank], rank))
        owned[rank].add(piece.name)
        written[rank] += piece.box.numel
    return owned


def _refuse_gaps(pieces: Iterable[Piece]) -> None:
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    for name, found in by_name.items():
        if not tile(found[0].shape, [piece.box for piece in found]) or len({piece.shape for piece in found}) > 1:
            raise ValueError(f"the ranks' pieces of {name} do not make up the whole: {found}")


def tile(shape: Extent, boxes: Sequence[Box]) -> bool:
    """Whether these boxes fill a tensor of this shape without an overlap."""
    inside = all(
        start >= 0 and start + length <= end
        for box in boxes
        for start, length, end in zip(box.offset, box.size, shape, strict=True)
    )
    return inside and sum(box.numel for box in boxes) == math.prod(shape) and not _any_overlap(boxes)


def _any_overlap(boxes: Sequence[Box]) -> bool:
    ordered = sorted(box for box in boxes if box.numel)
    for number, box in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if box.offset and other.offset[0] >= box.offset[0] + box.size[0]:
                break
            if box.overlap(other).numel:
                return True
    return False


def state_piece(holding: Holding, name: str, shape: Extent) -> Piece | None:
    """What a rank has of a stored tensor, which is a parameter, a buffer, or an optimizer's state of a parameter.

    Args:
        holding: of the rank, by names of parameters and buffers.
        name: of the tensor: a parameter's or buffer's own, or with the name of a state after it.
        shape: of the whole; a state that is one number is whole on each rank.

    Returns:
        A piece under this name, or nothing if the parameter is another rank's.

    Raises:
        ValueError: the shape is not that of the parameter.
    """
    piece = holding.get(name) or holding.get(name.rpartition(".")[0])
    if piece is None:
        return None
    if not shape:
        return whole(name, ())
    if shape != piece.shape:
        raise ValueError(f"tensor {name} is {shape}, this model's is {piece.shape}")
    return piece._replace(name=name)
