"""Collectives through memory that ranks share are those of gloo, and gloo's where they do not share any."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ProcessFailed, run_processes

from benthic.parallel import segments
from benthic.parallel.collectives import CountedAllGather, CountedReduceScatter, Ways
from benthic.parallel.segments import segments_of
from benthic.parallel.traffic import Traffic

SIZES = (1, 7, 64, 1000)
ROUNDS = 20


def numbers(rank, ranks, size, dtype, seed):
    """A rank's message to each of them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(ranks, size, generator=generator, dtype=torch.float64).to(dtype)


def exchanged(rank, dtype, room):
    """What a rank got that its neighbours in rank's parity sent, time and again."""
    segments._BYTES = room
    parities = [dist.new_group([r for r in range(dist.get_world_size()) if r % 2 == parity]) for parity in (0, 1)]
    group = parities[rank % 2]
    before = len(list(Path("/proc/self/fd").iterdir()))
    shared = segments_of(group)
    assert shared is not None
    # One more for each mapping, which Python duplicates; none for what this rank has made.
    assert len(list(Path("/proc/self/fd").iterdir())) == before + group.size()
    found = []
    for seed in range(ROUNDS):
        for size in SIZES:
            x = numbers(rank, group.size(), size, dtype, seed)
            part = torch.full((size,), torch.nan, dtype=dtype)
            shared.reduce_scatter(part, x.flatten())
            # As FSDP does it: what a rank sends is already in its place.
            whole = torch.full((group.size() * size,), torch.nan, dtype=dtype)
            own = whole[group.rank() * size : (group.rank() + 1) * size]
            own.copy_(x[0])
            shared.all_gather(whole, own)
            found.append((part, whole))
    return found


@pytest.mark.parametrize(
    ("neighbours", "dtype", "room"),
    [(2, torch.float32, 1 << 20), (3, torch.float64, 256), (2, torch.bfloat16, 64)],
    ids=str,
)
def test_everyone_gets_the_parts_and_sums_of_its_group(neighbours, dtype, room):
    found = run_processes(exchanged, 2 * neighbours, dtype, room)
    for rank, of_rank in enumerate(found):
        group = range(rank % 2, 2 * neighbours, 2)
        for (part, whole), (seed, size) in zip(
            of_rank, ((seed, size) for seed in range(ROUNDS) for size in SIZES), strict=True
        ):
            sent = [numbers(other, neighbours, size, dtype, seed) for other in group]
            assert torch.equal(part, sum(x[group.index(rank)] for x in sent))
            assert torch.equal(whole, torch.cat([x[0] for x in sent]))


def sent_by_fsdp(rank, apart):
    """What FSDP's collectives bring and count, and whether through memory; ``apart``: the last rank seems far away."""
    if apart and rank == dist.get_world_size() - 1:
        segments._NAME = "of another machine"
    ways, traffic, ranks = Ways(), Traffic(), dist.get_world_size()
    x = numbers(rank, ranks, 33, torch.float32, 0).flatten()
    part, whole = torch.empty(33), torch.empty(ranks * 33)
    CountedReduceScatter(traffic, ways)(part, x, dist.group.WORLD, dist.ReduceOp.SUM)
    CountedAllGather(traffic, ways)(whole, part, dist.group.WORLD)
    return whole, traffic.take(), ways.through_memory(dist.group.WORLD) is not None


def test_ranks_of_several_machines_send_the_same_through_gloo():
    near, far = run_processes(sent_by_fsdp, 3, False), run_processes(sent_by_fsdp, 3, True)
    assert [through_memory for *_, through_memory in near] == [True] * 3
    assert [through_memory for *_, through_memory in far] == [False] * 3
    for (whole, sent, _), (expected, expected_sent, _) in zip(near, far, strict=True):
        torch.testing.assert_close(whole, expected)
        assert sent == expected_sent == {"gradients": 2 * 33 * 4, "weights": 2 * 33 * 4}


def left_alone(rank):
    """One of two ends while the other waits for what it posts."""
    shared = segments_of(dist.group.WORLD)
    if rank == 1:
        os._exit(1)
    shared.all_gather(torch.empty(2), torch.ones(1))


def test_a_rank_whose_neighbour_has_ended_does_not_wait_for_it():
    with pytest.raises(ProcessFailed, match=r"statuses.*\[1, 1\][\s\S]*in all_gather[\s\S]*RuntimeError.*onnection"):
        run_processes(left_alone, 2)


def test_a_segment_of_the_right_name_with_another_number_is_another_machines():
    own, token = segments._create()
    try:
        assert segments._mapped(os.getpid(), own, token) is not None
        assert segments._mapped(os.getpid(), own, token + 1) is None
        assert segments._mapped(os.getpid(), own + 1000, token) is None
    finally:
        os.close(own)
