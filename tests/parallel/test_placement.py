"""Placements keep their promises on any load, and are near the best that trying everything finds."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic.errors import InputError
from benthic.parallel.placement import balanced, in_order, pack, replicate


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Tensor, dict[str, int]]:
    """Loads (M, E) and sizes that divide as they must."""
    nodes, gpus_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, nodes, 2 * nodes]))
    experts = groups * draw(st.integers(1, 4))
    gpus = nodes * gpus_per_node
    per_gpu = -(-experts // gpus) + draw(st.integers(0, 3))
    layers = draw(st.integers(1, 3))
    loads = draw(st.lists(st.integers(0, 1000), min_size=layers * experts, max_size=layers * experts))
    sizes = {"slots": per_gpu * gpus, "gpus": gpus, "nodes": nodes, "groups": groups}
    return torch.tensor(loads).view(layers, experts), sizes


@settings(deadline=None)
@given(clusters())
def test_every_placement_keeps_its_promises(case: tuple[Tensor, dict[str, int]]):
    load_ME, sizes = case
    placement = balanced(load_ME, **sizes)
    layers, experts = load_ME.shape
    assert placement.expert_MS.shape == (layers, sizes["slots"])
    for row, counts in zip(placement.expert_MS, placement.replicas_ME, strict=True):
        assert torch.equal(torch.bincount(row, minlength=experts), counts)
    assert int(placement.replicas_ME.min()) >= 1
    assert bool((placement.replicas_ME.sum(-1) == sizes["slots"]).all())
    torch.testing.assert_close(placement.gpu_load(load_ME).sum(-1), load_ME.double().sum(-1))
    torch.testing.assert_close(placement.node_load(load_ME).sum(-1), load_ME.double().sum(-1))


@settings(deadline=None)
@given(clusters())
def test_the_hierarchical_policy_keeps_a_group_on_one_node(case: tuple[Tensor, dict[str, int]]):
    load_ME, sizes = case
    if sizes["groups"] % sizes["nodes"]:
        return
    size = load_ME.shape[1] // sizes["groups"]
    for row in balanced(load_ME, **sizes).expert_MS // size:
        nodes_of = [set(node.tolist()) for node in row.view(sizes["nodes"], -1)]
        assert all(len(groups) == sizes["groups"] // sizes["nodes"] for groups in nodes_of)
        assert set.union(*nodes_of) == set(range(sizes["groups"]))


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 4))
def test_no_other_number_of_replicas_has_a_smaller_largest_load(load: list[int], redundant: int):
    load_ME = torch.tensor([load], dtype=torch.float64)
    held = replicate(load_ME, len(load) + redundant)
    counts = torch.bincount(held[0], minlength=len(load))
    best = min(
        max(x / n for x, n in zip(load, choice, strict=True))
        for choice in itertools.product(range(1, redundant + 2), repeat=len(load))
        if sum(choice) == len(load) + redundant
    )
    assert float((load_ME[0] / counts).max()) == pytest.approx(best)


def best_packing(load: list[float], packs: int) -> float:
    """Least possible load of the heaviest pack, by trying every way."""
    room = len(load) // packs

    def heaviest(left: frozenset[int], so_far: float) -> Iterator[float]:
        if not left:
            yield so_far
            return
        first = min(left)
        for others in itertools.combinations(sorted(left - {first}), room - 1):
            chosen = {first, *others}
            yield from heaviest(left - chosen, max(so_far, sum(load[item] for item in chosen)))

    return min(heaviest(frozenset(range(len(load))), 0.0))


@pytest.mark.parametrize(("packs", "room"), [(1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 1), (4, 2)])
def test_packing_is_near_the_best(packs: int, room: int):
    generator = torch.Generator().manual_seed(10 * packs + room)
    ratios = []
    for spread in (0.3, 1.0, 2.0):
        for _ in range(15):
            load_MN = torch.randn(1, packs * room, generator=generator).mul(spread).exp().double()
            order = pack(load_MN, packs)
            assert sorted(order[0].tolist()) == list(range(packs * room))
            heaviest = float(load_MN.gather(-1, order).view(packs, room).sum(-1).max())
            best = best_packing(load_MN[0].tolist(), packs)
            assert heaviest >= best - 1e-9
            ratios.append(heaviest / best)
    assert max(ratios) <= 4 / 3
    assert sum(ratios) / len(ratios) < 1.04
    if room == 1 or packs == 1:
        assert max(ratios) == pytest.approx(1)


def test_what_the_published_example_gives():
    """Two layers of 12 experts in 4 groups, 16 slots on 2 nodes of 4 GPUs: the README of deepseek-ai/EPLB."""
    load_ME = torch.tensor(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    placement = balanced(load_ME, slots=16, gpus=8, nodes=2, groups=4)
    assert placement.expert_MS.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_a_busy_expert_is_shared_and_none_is_without_a_slot():
    load_ME = torch.tensor([[80.0, 0, 0, 0, 0, 0, 10, 10]])
    before, after = in_order(1, 8, gpus=4), balanced(load_ME, slots=12, gpus=4)
    assert float(before.gpu_load(load_ME).max() / before.gpu_load(load_ME).mean()) == pytest.approx(3.2)
    assert float(after.gpu_load(load_ME).max() / after.gpu_load(load_ME).mean()) < 1.3


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"slots": 7, "gpus": 1}, "slots=7"),
        ({"slots": 10, "gpus": 4}, "gpus=4: must divide slots=10"),
        ({"slots": 8, "gpus": 4, "nodes": 3}, "nodes=3: must divide gpus=4"),
        ({"slots": 8, "gpus": 4, "groups": 3}, "groups=3: must divide experts=8"),
        ({"slots": 8, "gpus": 0}, "gpus=0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(sizes: dict[str, int], said: str):
    with pytest.raises(InputError, match=said):
        balanced(torch.ones(1, 8), **sizes)


def test_loads_that_are_none_are_refused():
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match="negative load or NaN"):
            balanced(torch.tensor([[1.0, wrong]]), slots=2, gpus=1)
