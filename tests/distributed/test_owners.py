"""Matrices put together on one rank each, worked on, and divided again."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from benthic.parallel.owners import on_whole, owners

SHAPES = [(7, 3), (1, 5), (16, 4), (2, 2), (9, 1)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def centred(number, matrix):
    """Something that needs a whole matrix, and which one it is."""
    return matrix - matrix.mean(0) + number


def shares(rank):
    parts = [(*matrix.chunk(dist.get_world_size()), *[matrix[:0]] * 4)[rank] for matrix in matrices()]
    return on_whole(parts, [rows for rows, _ in SHAPES], dist.group.WORLD, centred)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_work_on_whole_matrices_comes_back_in_parts(ranks):
    found = run_processes(shares, ranks)
    for number, matrix in enumerate(matrices()):
        together = torch.cat([part[number] for part in found])
        torch.testing.assert_close(together, centred(number, matrix), atol=0, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_nobody_has_much_more_to_do_than_need_be(ranks):
    """Graham's bound: the largest first, each to whoever has least, is at most 4/3 of the best there is."""
    sizes = [100, 1, 50, 50, 30, 30, 40, 7, 7, 90]
    chosen = owners(sizes, ranks)
    loads = [sum(size for size, owner in zip(sizes, chosen, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * max(sum(sizes) / ranks, max(sizes))
