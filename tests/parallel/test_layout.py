"""Rank arithmetic."""

import itertools

import pytest

from benthic.parallel.layout import AXES, DATA_AXES, SHARDED_AXES, Coordinates, Layout, passes_of_ranks, rows_of_rank

LAYOUTS = [Layout(*sizes) for sizes in itertools.product((1, 2, 3), repeat=4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_coordinates_are_inverse(layout):
    places = {layout.coordinates(rank) for rank in range(layout.world)}
    assert len(places) == layout.world
    assert [layout.rank(layout.coordinates(rank)) for rank in range(layout.world)] == list(range(layout.world))
    assert layout.rank(Coordinates()) == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_cut_the_world_into_equal_parts(layout):
    for count in range(len(AXES) + 1):
        for axes in itertools.combinations(AXES, count):
            groups = layout.groups(axes)
            assert sorted(itertools.chain(*groups)) == list(range(layout.world))
            assert {len(group) for group in groups} == {layout.size(axes)}
            for rank in range(layout.world):
                group = layout.group(rank, axes)
                assert group in groups
                assert rank in group


def test_an_expert_group_is_of_neighbours():
    layout = Layout(pipeline=2, expert=4, shard=2, replicate=2)
    assert layout.group(13, ["expert"]) == (12, 13, 14, 15)
    assert layout.group(13, ["shard"]) == (9, 13)
    assert layout.group(13, SHARDED_AXES) == tuple(range(8, 16))
    assert layout.group(13, ["replicate"]) == (5, 13)
    assert layout.group(13, DATA_AXES) == tuple(range(16))
    assert layout.group(13, ["pipeline"]) == (13, 29)


def test_the_ranks_of_a_pipeline_share_their_rows():
    layout = Layout(pipeline=3, expert=2, shard=2)
    for rank in range(layout.world):
        assert {layout.data_rank(other) for other in layout.group(rank, ["pipeline"])} == {layout.data_rank(rank)}
    assert sorted(layout.data_rank(rank) for rank in layout.group(0, DATA_AXES)) == list(range(4))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 5, 6, 8, 12])
def test_every_row_is_read_once_in_as_few_passes_as_can_be(batch, ranks, micro_batch):
    shares = [rows_of_rank(batch, ranks, rank, micro_batch) for rank in range(ranks)]
    assert list(itertools.chain(*shares)) == list(range(batch))
    passes = passes_of_ranks(batch, ranks, micro_batch)
    assert passes == -(-batch // (micro_batch * ranks))
    assert all(len(share) <= passes * micro_batch for share in shares)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_passes_are_those_of_one_process_where_there_are_enough(ranks):
    for share in (rows_of_rank(13, ranks, rank, 3) for rank in range(ranks)):
        assert share.start % 3 == 0
        assert share.stop % 3 == 0 or share.stop == 13
