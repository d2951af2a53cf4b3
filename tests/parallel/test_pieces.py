"""Pieces of tensors: cuts against torch's own, any two layouts of one tensor, and who writes what."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from benthic.parallel.pieces import Box, Cut, Piece, cut, cuts_of, piece_of, share_out, state_piece, tile, whole

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw, shape):
    """The pieces of one tensor on every rank: cuts of any dimensions, then copies on some ranks."""
    ways = draw(st.lists(st.tuples(st.integers(0, len(shape) - 1), st.integers(1, 5)), max_size=3))
    indices = itertools.product(*(range(parts) for _, parts in ways))
    pieces = [cut(whole("w", shape), [Cut(*way, i) for way, i in zip(ways, index, strict=True)]) for index in indices]
    return pieces * draw(st.integers(1, 3))


@given(st.data(), SHAPES)
def test_one_layout_read_under_any_other_gives_the_same_numbers(data, shape):
    tensor = torch.randn(shape)
    saved, loaded = data.draw(layouts(shape)), data.draw(layouts(shape))
    stored = {piece.box: tensor[piece.box.slices].clone() for piece in saved}
    for piece in loaded:
        found = torch.full(piece.size, math.nan)
        for box, part in stored.items():
            common = box.overlap(piece.box)
            if common.numel:
                found[common.within(piece.box).slices] = part[common.within(box).slices]
        assert torch.equal(found, tensor[piece.box.slices])


@given(st.data(), st.lists(SHAPES, min_size=1, max_size=4))
def test_every_piece_is_written_once(data, shapes):
    columns = [data.draw(layouts(shape)) for shape in shapes]
    holdings = [
        {f"w{number}": pieces[rank]._replace(name=f"w{number}") for number, pieces in enumerate(columns) if
         rank < len(pieces)}
        for rank in range(max(map(len, columns)))
    ]  # fmt: skip
    owned = share_out(holdings)
    for number, shape in enumerate(shapes):
        name = f"w{number}"
        boxes = [holding[name].box for holding, names in zip(holdings, owned, strict=True) if name in names]
        assert all(box.numel for box in boxes)
        assert tile(shape, boxes)


def test_copies_are_shared_out_evenly():
    holdings = [{f"w{i}": whole(f"w{i}", (4, 4)) for i in range(12)}] * 4
    assert [len(names) for names in share_out(holdings)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 3))],
        [Box((0, 0), (2, 3)), Box((1, 0), (2, 3))],
        [Box((0, 0), (4, 2)), Box((0, 1), (4, 1))],
        [Box((0, 0), (2, 3)), Box((3, 0), (2, 3))],
    ],
)
def test_gaps_and_overlaps_are_refused(boxes):
    assert not tile((4, 3), boxes)
    with pytest.raises(ValueError, match="pieces of w do not make up the whole"):
        share_out([{"w": Piece("w", (4, 3), *box)} for box in boxes])


def test_copies_do_not_tile():
    assert not tile((4, 3), [Box((0, 0), (4, 3))] * 2)


def test_the_order_of_pieces_does_not_matter_for_filling():
    boxes = [Box((i, j), (1, 1)) for i in range(4) for j in range(3)]
    random.Random(0).shuffle(boxes)
    assert tile((4, 3), boxes)
    assert not tile((4, 3), boxes[:-1])


def test_a_scalar_is_one_piece():
    assert whole("step", ()).box.numel == 1
    assert [len(names) for names in share_out([{"step": whole("step", ())}] * 2)] == [1, 0]


PLACEMENTS = [
    ((4,), (Shard(0),)),
    ((4,), (Shard(1),)),
    ((2, 3), (Replicate(), Shard(0))),
    ((2, 3), (Shard(0), Shard(1))),
    ((2, 3), (Shard(0), Shard(0))),
    ((2, 2, 2), (Replicate(), Shard(1), Shard(0))),
]


@pytest.mark.parametrize(("mesh", "placements"), PLACEMENTS)
@settings(max_examples=30)
@given(shape=st.tuples(st.integers(1, 11), st.integers(1, 11)))
def test_placements_are_cut_as_torch_cuts_them(mesh, placements, shape):
    for coordinate in itertools.product(*map(range, mesh)):
        piece = cut(whole("w", shape), cuts_of(placements, mesh, coordinate))
        size, offset = _compute_local_shape_and_global_offset(
            shape, mesh, lambda dim, at=coordinate: at[dim], placements
        )
        assert piece.size == tuple(size)
        if piece.box.numel:
            assert piece.offset == tuple(offset)


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_a_strided_shard_is_cut_last(experts):
    mesh, placements = (2, 2), (_StridedShard(0, split_factor=2), Shard(0))
    for coordinate in itertools.product(range(2), range(2)):
        piece = cut(whole("w", (experts, 3)), cuts_of(placements, mesh, coordinate))
        size, offset = _compute_local_shape_and_global_offset(
            (experts, 3), mesh, lambda dim, at=coordinate: at[dim], placements
        )
        assert (piece.size, piece.offset) == (tuple(size), tuple(offset))


def test_a_sum_that_is_not_taken_is_no_state():
    with pytest.raises(ValueError, match="no state of a run"):
        cuts_of([Partial()], (2,), (0,))


def test_experts_split_before_the_tensor_knows_of_it():
    assert piece_of("down", torch.empty(2, 5, 3), [Cut(0, 4, 3)]) == Piece("down", (8, 5, 3), (6, 0, 0), (2, 5, 3))
    assert piece_of("norm", torch.empty(5)) == whole("norm", (5,))


def test_states_lie_as_their_parameters_do():
    holding = {"a.weight": Piece("a.weight", (8, 3), (2, 0), (2, 3)), "router.bias": whole("router.bias", (4,))}
    assert state_piece(holding, "a.weight.exp_avg", (8, 3)) == Piece("a.weight.exp_avg", (8, 3), (2, 0), (2, 3))
    assert state_piece(holding, "a.weight", (8, 3)) == holding["a.weight"]
    assert state_piece(holding, "a.weight.step", ()) == whole("a.weight.step", ())
    assert state_piece(holding, "b.weight", (8, 3)) is None
    with pytest.raises(ValueError, match=r"a.weight.exp_avg is \(9, 3\)"):
        state_piece(holding, "a.weight.exp_avg", (9, 3))
