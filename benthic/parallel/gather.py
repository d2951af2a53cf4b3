"""Divided tensors put together on one process.

Every divided tensor is cut along its first dimension. An expert's weights are cut by expert rank, then each part by
shard rank; all others by both at once. Cuts are those of ``torch.chunk``, as FSDP2 makes them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benthic.model.moe import Experts
from benthic.parallel.layout import Layout, chunk
from benthic.parallel.local import local
from benthic.parallel.messages import broadcast


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
        return chunk(range(weight.rows), layout.shard * layout.expert, place.shard * layout.expert + place.expert)
    return chunk(chunk(range(weight.rows), layout.expert, place.expert), layout.shard, place.shard)


def whole(tensors: dict[str, Tensor], parts: dict[str, Divided], layout: Layout, rank: int) -> dict[str, Tensor]:
    """Whole tensors on rank 0; nothing on others. Called on all, on those of a stage with tensors of the same names."""
    found = {}
    for stage in range(layout.pipeline):
        ranks = [other for other in range(layout.world) if layout.coordinates(other).pipeline == stage]
        here = tensors if rank in ranks else {}
        described = {name: _describe(name, tensor, parts) for name, tensor in here.items()}
        if layout.pipeline > 1:
            described = {
                name: _Described(tuple(shape), dtype, Divided(*weight) if weight else None)
                for name, (shape, dtype, weight) in broadcast(described, ranks[0]).items()
            }
        for name, one in described.items():
            held = local(here[name].detach()) if here else None
            together = _together(held, one, layout, rank, ranks)
            if together is not None:
                found[name] = together
    return found


class _Described(NamedTuple):
    """What rank 0 must know of a tensor that others send it."""

    shape: tuple[int, ...]
    dtype: str
    weight: Divided | None
    """None: each rank has all of it."""


def _describe(name: str, tensor: Tensor, parts: dict[str, Divided]) -> _Described:
    held = local(tensor)
    return _Described(tuple(held.shape), str(held.dtype).removeprefix("torch."), _weight_of(name, held, parts))


def _together(held: Tensor | None, one: _Described, layout: Layout, rank: int, ranks: Sequence[int]) -> Tensor | None:
    """The ranks of a stage's first copy send what they hold to rank 0."""
    weight = one.weight or Divided(one.shape[0] if one.shape else 1, expert=False)
    senders = [other for other in ranks if layout.coordinates(other).replicate == 0] if one.weight else ranks[:1]
    if rank:
        if rank in senders and held is not None and held.numel():
            dist.send(held.contiguous(), 0)
        return None
    out = torch.empty(weight.rows, *one.shape[1:], dtype=getattr(torch, one.dtype))
    for other in senders:
        rows = rows_held(weight, layout, other) if one.weight else range(weight.rows)
        part = out[rows.start : rows.stop]
        if other == 0 and held is not None:
            part.copy_(held)
        elif part.numel():
            dist.recv(part, other)
    return out if one.shape else out[0]


def _weight_of(name: str, tensor: Tensor, parts: dict[str, Divided]) -> Divided | None:
    """The weight that a tensor is, or is the state of: ``NAME`` or ``NAME.exp_avg``."""
    if not tensor.ndim:
        return None
    return parts.get(name) or parts.get(name.rpartition(".")[0])
