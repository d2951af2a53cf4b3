"""Weights that several ranks hold, compared by a hash each: a bit that flips in one copy is found, and named.

Copies are made alike by the same arithmetic on the same numbers, so they are equal bit for bit; nothing else tells a
fault of memory in one of them from training. Each rank hashes what it holds, one message shows all ranks the hashes of
all, and every rank comes to the same verdict.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.errors import WorkFailed
from benthic.parallel.local import local
from benthic.parallel.pieces import Holding, Piece

_CHUNK = 2**22
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Odd multipliers (of SplitMix64, as signed numbers)."""


class CopiesDiffer(WorkFailed):
    """Ranks that should hold the same numbers do not."""


def hash_of(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bytes: int64, a scalar.

    The sum of its 32-bit words (8 or 16 bits of smaller types), each times an odd number that depends on its place,
    modulo 2**64. So a change within one word is always noticed, and any other nearly always.
    """
    words = _words(tensor.detach().contiguous())
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        total += (chunk * _odd(start, len(chunk), tensor.device)).sum()
    return total


def _words(tensor: Tensor) -> Tensor:
    sizes = {1: torch.uint8, 2: torch.int16}
    return tensor.flatten().view(sizes.get(tensor.element_size(), torch.int32))


def _odd(start: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers that look like chance, for places from ``start`` on (SplitMix64 of the place)."""
    x = torch.arange(start + 1, start + count + 1, device=device) * _MIX[0]
    x = (x ^ _shifted(x, 30)) * _MIX[1]
    x = (x ^ _shifted(x, 27)) * _MIX[2]
    return (x ^ _shifted(x, 31)) | 1


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right, with zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Difference(NamedTuple):
    """Ranks whose copy of a tensor is not that of others."""

    name: str
    ranks: tuple[int, ...]
    """Those in the minority; all holders, where there is none."""
    holders: tuple[int, ...]

    def __str__(self) -> str:
        if self.ranks == self.holders:
            return f"{self.name} differs between ranks {_listed(self.holders)}"
        return f"{self.name} of rank {_listed(self.ranks)} differs from that of ranks {_listed(self.others)}"

    @property
    def others(self) -> tuple[int, ...]:
        """Holders that agree."""
        return tuple(rank for rank in self.holders if rank not in self.ranks)


def hashes_of(tensors: Mapping[str, Mapping[str, Tensor]], holdings: Sequence[Holding], rank: int) -> Tensor:
    """A hash for each parameter and buffer of a rank, with the optimizer's states and the average of it.

    Args:
        tensors: of the rank, in groups, as a checkpoint has them.
        holdings: of all ranks.
        rank: this one.

    Returns:
        One for each name of the rank in order, then zeros: as many numbers on every rank.
    """
    holding = holdings[rank]
    result = torch.zeros(max(map(len, holdings)), dtype=torch.int64)
    at = {name: number for number, name in enumerate(sorted(holding))}
    for group, named in sorted(tensors.items()):
        for name, tensor in sorted(named.items()):
            parameter = name if name in at else name.rpartition(".")[0]
            if parameter in at:
                # Odd, and another for each of a parameter's tensors, so that exchanged ones are noticed.
                result[at[parameter]] += hash_of(local(tensor)).cpu() * (2 * zlib.crc32(f"{group}.{name}".encode()) + 1)
    return result


def differences(holdings: Sequence[Holding], hashes: Sequence[Tensor]) -> list[Difference]:
    """Which copies differ, by name; ``hashes`` are those of :func:`hashes_of`, of every rank."""
    copies: dict[Piece, dict[int, int]] = defaultdict(dict)
    for rank, (holding, numbers) in enumerate(zip(holdings, hashes, strict=True)):
        for name, number in zip(sorted(holding), numbers.tolist(), strict=False):
            copies[holding[name]][rank] = number
    found = (_difference(piece.name, by_rank) for piece, by_rank in copies.items() if piece.box.numel)
    return sorted(difference for difference in found if difference)


def _difference(name: str, by_rank: Mapping[int, int]) -> Difference | None:
    (number, most), *others = Counter(by_rank.values()).most_common()
    if not others:
        return None
    undecided = others[0][1] == most
    ranks = tuple(sorted(rank for rank, other in by_rank.items() if undecided or other != number))
    return Difference(name, ranks, tuple(sorted(by_rank)))


def _listed(ranks: Sequence[int]) -> str:
    *first, last = map(str, ranks)
    return f"{', '.join(first)} and {last}" if first else last
