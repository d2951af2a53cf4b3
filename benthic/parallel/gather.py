"""Divided tensors put together on one process, and cut up again: for checkpoints in the format of one process.

Every divided tensor is cut along its first dimension. An expert's weights are cut by expert rank, then each part by
shard rank; all others by both at once. Cuts are those of ``torch.chunk``, as FSDP2 makes them.
"""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from benthic.model.moe import Experts
from benthic.parallel.layout import Layout
from benthic.parallel.local import local


class Divided(NamedTuple):
    """A weight of which each process holds a part."""

    rows: int
    """Of the whole."""
    expert: bool


def divided(model: nn.Module, layout: Layout) -> dict[str, Divided]:
    """All weights of a model by name."""
    experts = {id(p) for part in model.modules() if isinstance(part, Experts) for p in part.parameters()}
    return {
        name: Divided(len(p) * (layout.expert if id(p) in experts else 1), id(p) in experts)
        for name, p in model.named_parameters()
    }


def rows_held(weight: Divided, layout: Layout, rank: int) -> range:
    """The rows of a weight that a rank holds."""
    place = layout.coordinates(rank)
    if not weight.expert:
        return _chunk(range(weight.rows), layout.shard * layout.expert, place.shard * layout.expert + place.expert)
    return _chunk(_chunk(range(weight.rows), layout.expert, place.expert), layout.shard, place.shard)


def _chunk(rows: range, parts: int, number: int) -> range:
    size = -(-len(rows) // parts)
    return rows[number * size : (number + 1) * size]


def own(tensors: dict[str, Tensor], parts: dict[str, Divided], layout: Layout, rank: int) -> dict[str, Tensor]:
    """What a rank holds of whole tensors."""
    found = {}
    for name, tensor in tensors.items():
        weight = _weight_of(name, tensor, parts)
        if weight and len(tensor) == weight.rows:  # a tensor of another model is refused where it is used
            rows = rows_held(weight, layout, rank)
            tensor = tensor[rows.start : rows.stop]
        found[name] = tensor
    return found


def whole(tensors: dict[str, Tensor], parts: dict[str, Divided], layout: Layout, rank: int) -> dict[str, Tensor]:
    """Whole tensors on rank 0; nothing on others. Called on all, with tensors of the same names."""
    found = {}
    for name, tensor in tensors.items():
        held = local(tensor.detach())
        weight = _weight_of(name, held, parts)
        if weight is None:
            found[name] = held
            continue
        together = _together(held, weight, layout, rank)
        if together is not None:
            found[name] = together
    return found if rank == 0 else {}


def _together(held: Tensor, weight: Divided, layout: Layout, rank: int) -> Tensor | None:
    """The ranks of the first copy send what they hold to rank 0."""
    if rank:
        if layout.coordinates(rank).replicate == 0 and held.numel():
            dist.send(held.contiguous(), 0)
        return None
    out = held.new_empty(weight.rows, *held.shape[1:])
    for other in range(layout.world):
        rows = rows_held(weight, layout, other)
        if layout.coordinates(other).replicate or not out[rows.start : rows.stop].numel():
            continue
        if other == 0:
            out[rows.start : rows.stop] = held
        else:
            dist.recv(out[rows.start : rows.stop], other)
    return out


def _weight_of(name: str, tensor: Tensor, parts: dict[str, Divided]) -> Divided | None:
    """The weight that a tensor is, or is the state of: ``NAME`` or ``NAME.exp_avg``."""
    if not tensor.ndim:
        return None
    return parts.get(name) or parts.get(name.rpartition(".")[0])
