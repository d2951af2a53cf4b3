"""Lists of actions: complete, in an order that goes on, and as idle as published."""

import pytest

from benthic.parallel.schedules import Computation, forward_orders, orders, parts
from benthic.parallel.stage_ranks import KINDS, ranks_of_stages, stages_of_rank
from benthic.parallel.timeline import Times, idle_share, published_idle_share, simulate, svg, text


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 7, 8, 11, 16, 19])
def test_every_stage_runs_every_micro_batch_once_each_way(schedule, ranks, micro_batches):
    held = ranks_of_stages(schedule, ranks)
    found = orders(schedule, ranks, micro_batches)
    done = [
        (kind, part.stage_index, part.microbatch_index, rank)
        for rank, actions in found.items()
        for action in actions
        for part in parts(action)
        for kind in {"B": "IW"}.get(part.computation_type.value, part.computation_type.value)
    ]
    expected = {
        (kind, stage, micro_batch, rank)
        for kind in "FIW"
        for stage, rank in enumerate(held)
        for micro_batch in range(micro_batches)
    }
    assert len(done) == len(set(done))
    assert set(done) == expected
    simulate(found, len(held), Times())


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_forward_passes_alone_come_in_an_order_that_goes_on(schedule, ranks):
    found, stages = forward_orders(schedule, ranks, 5), len(ranks_of_stages(schedule, ranks))
    assert all(action.computation_type == Computation.FORWARD for actions in found.values() for action in actions)
    assert sum(map(len, found.values())) == 5 * stages
    line = simulate(found, stages, Times())
    # A full pipeline works on all ranks at once: each waits for its first micro-batch and no more than that.
    assert max(span.end for spans in line.values() for span in spans) <= 5 * stages / ranks + stages


def test_first_and_last_stage_of_a_v_share_a_rank():
    assert stages_of_rank("zbv", 4, 0) == [0, 7]
    assert stages_of_rank("dualpipev", 4, 3) == [3, 4]
    assert stages_of_rank("interleaved", 4, 3) == [3, 7]


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipev"])
@pytest.mark.parametrize("stages", [4, 8])
@pytest.mark.parametrize("micro_batches", [8, 16, 40])
@pytest.mark.parametrize("times", [Times(1, 1, 1), Times(2, 2, 1), Times(3, 3, 1)])
def test_idle_time_is_the_published(schedule, stages, micro_batches, times):
    ranks = stages // KINDS[schedule].stages_per_rank
    found = idle_share(simulate(orders(schedule, ranks, micro_batches), stages, times))
    expected = published_idle_share(schedule, stages, ranks, micro_batches, times)
    assert found == pytest.approx(expected, rel=1e-9)


def test_lists_that_wait_for_one_another_are_told():
    stuck = orders("1f1b", 2, 2)
    stuck[0] = stuck[0][::-1]
    with pytest.raises(ValueError, match="does not go on: rank 0 before 0B1, rank 1 before 1F0"):
        simulate(stuck, 2, Times())


def test_a_timeline_as_text_and_as_a_picture():
    line = simulate(orders("1f1b", 2, 2), 2, Times(1, 0.5, 0.5))
    assert text(line, 1.0).splitlines() == [
        "rank 0: 0F0 0F1     0B0     0B1",
        "rank 1:     1F0 1B0 1F1 1B1",
    ]
    picture = svg(line, "1F1B")
    assert picture.count("<title>") == 8
    assert f"{idle_share(line):.1%} idle" in picture
