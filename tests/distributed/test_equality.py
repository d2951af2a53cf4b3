"""Training spread over processes gives what one process gives: losses of all steps and all tensors at the end.

In float64, to 1e-9. Passes are the same on every layout (one sequence each), the batch ramps up, so
that some ranks have nothing to do in some passes, gradients are clipped, and an average is kept.
"""

import itertools
from functools import partial

import pytest
import torch
from processes import run_processes
from spread import (
    ALONE,
    InFloat32,
    InFloat64,
    Rows,
    largest_difference,
    settings,
    spread_over,
    spread_steps,
    take_steps,
)

from benthic.parallel.group import Group
from benthic.train.schedule import Course
from benthic.train.state import TrainState
from benthic.train.step import accumulate_gradients, train_step
from benthic.train.validate import bits_per_byte_of

LAYOUTS = [
    {"expert": expert, "shard": shard, "replicate": replicate}
    for expert, shard, replicate in itertools.product((1, 2, 4, 8), repeat=3)
    if expert * shard * replicate in (2, 4, 8)
]
MUON = {"optimizer": {"name": "muon", "matrix_learning_rate": 1e-3, "matrix_products": "fp32", "clip_norm": 0.5}}
EMBEDDING = {
    "embedding_std": 1.0,
    "optimizer": {"learning_rate": 1e-3, "embedding_learning_rate": 1e-2, "clip_norm": 0.5},
}


def assert_equal(config, architecture, parallel, tolerance):
    """One process, and as many as the layout has."""
    torch.set_num_threads(1)
    alone = take_steps(config, ALONE, architecture)
    processes = parallel.get("expert", 1) * parallel.get("shard", 1) * parallel.get("replicate", 1)
    spread = run_processes(spread_steps, processes, spread_over(config, **parallel), architecture, timeout=280)[0]
    assert spread.loads == alone.loads
    assert largest_difference(alone, spread) < tolerance
    assert min(row[-1] for row in alone.losses) > 0.5  # so clipping takes part
    return spread


@pytest.mark.parametrize(
    ("ways", "parallel"),
    [
        ({}, {"shard": 2, "zero": 1}),
        ({"micro_batch_size": None}, {"shard": 2, "zero": 2}),
        ({"recompute": True}, {"shard": 2, "zero": 3}),
        ({"recompute": True}, {"expert": 2, "replicate": 2, "zero": 3}),
        ({"compute": "fp8"}, {"expert": 2, "fp8_dispatch": True}),
        (MUON, {"shard": 2}),
        (EMBEDDING, {"shard": 2, "zero": 1}),
        (EMBEDDING, {"shard": 2, "zero": 3}),
        (MUON, {"expert": 2, "shard": 2, "zero": 2}),
        (MUON | {"schedule": {"mtp_every": 2}}, {"shard": 2, "zero": 3}),
    ],
)
def test_a_layout_gives_what_one_process_gives(ways, parallel):
    assert_equal(settings(steps=5, **ways), InFloat64(), parallel, 1e-9)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_zero_2_and_3_give_what_one_process_gives(parallel, zero):
    """ZeRO-1 is in the table of all layouts."""
    assert_equal(settings(), InFloat64(), parallel | {"zero": zero}, 1e-9)


def test_weights_and_gradients_travel_as_often_as_zero_says():
    """With one pass a rank, ZeRO-2 sends what ZeRO-1 does; ZeRO-3 gathers blocks twice, and not the rest."""
    sent = []
    for zero in (1, 2, 3):
        config = spread_over(settings(steps=2, micro_batch_size=4, batch_size=8), shard=2, zero=zero)
        sent.append(run_processes(spread_steps, 2, config, InFloat32())[0].sent[-1])
    assert sent[0] == sent[1]
    assert sent[2]["gradients"] == sent[0]["gradients"]
    assert sent[0]["weights"] == sent[0]["gradients"]
    assert 1.5 < sent[2]["weights"] / sent[0]["weights"] < 2


def judged(world, config):
    """Steps in bf16, with held-out text read in bf16 and in fp32 after each: mean nats, and gradient norms."""
    found = []
    state, rows = TrainState(config, InFloat32(), world=world), Rows(config)
    for step in range(3):
        now = Course(config.train.schedule, 3, 8).at(step)
        own = world.rows(now.batch_size, 1)
        report = train_step(
            state.objective, state.optimizer, rows.at(now.first_sequence + own.start, len(own)), now,
            micro_batch_size=1, compute="bf16", gradients=partial(accumulate_gradients, world=world), world=world,
        )  # fmt: skip
        for compute in ("bf16", "fp32"):
            with world.evaluating(state.objective, compute):
                batches = [rows.at(1000 + number, 2) for number in range(3)]
                found.append(bits_per_byte_of(state.model, batches, 1, 1, compute, world))
        found.append(report.grad_norm)
    return found


def judged_by_several(rank, config):
    return judged(Group(config.parallel), config)


@pytest.mark.parametrize("parallel", [{"shard": 2, "zero": 3}, {"expert": 2}], ids=str)
def test_what_learns_in_bf16_is_judged_in_fp32(parallel):
    config = settings(compute="bf16", model={"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8})
    torch.set_num_threads(1)
    alone = judged(ALONE, config)
    one, other = run_processes(judged_by_several, 2, spread_over(config, **parallel))
    assert one == other
    assert one == pytest.approx(alone, rel=2e-3)
    exact = alone[1::3]
    assert one[1::3] == pytest.approx(exact, rel=1e-3)
    assert all(abs(rounded - precise) > 1e-5 for rounded, precise in zip(one[::3], one[1::3], strict=True))
