"""Micro-batches in flight, against published figures and a count that follows each one."""

import pytest

from benthic.parallel.in_flight import most_in_flight
from benthic.parallel.schedules import Computation, orders, parts
from benthic.parallel.stage_ranks import stages_of_rank


def most(schedule, ranks, rank, micro_batches, kept=None):
    return most_in_flight(
        orders(schedule, ranks, micro_batches)[rank],
        kept or dict.fromkeys(stages_of_rank(schedule, ranks, rank), 1.0),
    )


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 20])
def test_1f1b_holds_as_many_as_stages_follow(micro_batches):
    """arXiv 2006.09503."""
    for rank in range(4):
        assert most("1f1b", 4, rank, micro_batches).bytes == min(micro_batches, 4 - rank)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dualpipev_holds_one_more_than_it_has_stages(ranks):
    """PP + 1 of PP stages on PP / 2 ranks (github.com/deepseek-ai/DualPipe)."""
    stages = 2 * ranks
    assert [most("dualpipev", ranks, rank, 4 * stages).bytes for rank in range(ranks)] == [stages + 1] * ranks


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_lifetimes_one_by_one(schedule):
    ranks, micro_batches = 4, 12
    for rank, order in orders(schedule, ranks, micro_batches).items():
        kept = {stage: 10.0 + stage for stage in stages_of_rank(schedule, ranks, rank)}
        actions = [part for action in order for part in parts(action)]
        begins, ends = {}, {}
        for moment, action in enumerate(actions):
            place = action.stage_index, action.microbatch_index
            if action.computation_type == Computation.FORWARD:
                begins[place] = moment
            else:  # the last of its backward passes
                ends[place] = moment
        assert begins.keys() == ends.keys()
        alive = [
            sum(kept[stage] for stage, number in begins if begins[stage, number] <= moment < ends[stage, number])
            for moment in range(len(actions))
        ]
        found = most_in_flight(order, kept)
        assert found.bytes == max(alive)
        assert sum(kept[stage] * count for stage, count in found.micro_batches.items()) == found.bytes
