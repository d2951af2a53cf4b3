"""Matrices divided by rows, each put together on one rank of the group for a while: for what needs them whole.

Two messages carry all of them there and back, and each rank works on about as many numbers as any other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benthic.parallel.layout import chunk
from benthic.parallel.local import is_divided

Work = Callable[[int, Tensor], Tensor]


def dividing_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks among which a tensor is divided along its first dimension; none if this one has it whole."""
    if not is_divided(tensor):
        return None
    divided: Any = tensor
    group: dist.ProcessGroup = divided.device_mesh.get_group(divided.device_mesh.ndim - 1)
    return group if group.size() > 1 else None


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Who works on each of some matrices, the largest first given to whoever has least."""
    loads, chosen = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        chosen[number] = min(range(ranks), key=loads.__getitem__)
        loads[chosen[number]] += sizes[number]
    return chosen


def on_whole(parts: Sequence[Tensor], rows: Sequence[int], group: dist.ProcessGroup, work: Work) -> list[Tensor]:
    """The rows held here of ``work(number, matrix)``, which keeps a matrix's shape, for each of some matrices.

    Args:
        parts: the rows of each that are held here, cut as ``torch.chunk`` does; of one dtype.
        rows: how many each has in all.
    """
    if not parts:
        return []
    here, ranks = group.rank(), group.size()
    chosen = owners([count * part.shape[1] for count, part in zip(rows, parts, strict=True)], ranks)
    mine = [number for number, owner in enumerate(chosen) if owner == here]
    held = [[len(chunk(range(rows[number]), ranks, rank)) for rank in range(ranks)] for number in range(len(parts))]
    of_owner = [[number for number, owner in enumerate(chosen) if owner == rank] for rank in range(ranks)]
    leaving = [sum(parts[number].numel() for number in numbers) for numbers in of_owner]
    coming = [sum(held[number][rank] * parts[number].shape[1] for number in mine) for rank in range(ranks)]

    came = parts[0].new_empty(sum(coming))
    in_order = [parts[number].reshape(-1) for numbers in of_owner for number in numbers]
    dist.all_to_all_single(came, torch.cat(in_order), coming, leaving, group=group)
    pieces: dict[int, list[Tensor]] = {number: [] for number in mine}
    for message in came.split(coming):
        sizes = [held[number][len(pieces[number])] * parts[number].shape[1] for number in mine]
        for number, piece in zip(mine, message.split(sizes), strict=True):
            pieces[number].append(piece.view(-1, parts[number].shape[1]))
    done = {number: work(number, torch.cat(pieces[number])).to(came.dtype) for number in mine}

    cut = {number: done[number].split(held[number]) for number in mine}
    back = [cut[number][rank].reshape(-1) for rank in range(ranks) for number in mine]
    got = came.new_empty(sum(leaving))
    dist.all_to_all_single(got, torch.cat(back) if back else came.new_empty(0), leaving, coming, group=group)
    found: dict[int, Tensor] = {}
    for numbers, message in zip(of_owner, got.split(leaving), strict=True):
        for number, flat in zip(numbers, message.split([parts[number].numel() for number in numbers]), strict=True):
            found[number] = flat.view_as(parts[number])
    return [found[number] for number in range(len(parts))]
