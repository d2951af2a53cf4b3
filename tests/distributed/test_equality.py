"""Training spread over processes gives what one process gives: losses of all steps and all tensors at the end.

In float64, to 1e-9. Passes are the same on every layout (one sequence each), the batch ramps up, so
that some ranks have nothing to do in some passes, gradients are clipped, and an average is kept.
"""

import itertools

import pytest
import torch
from processes import run_processes
from spread import ALONE, InFloat32, InFloat64, largest_difference, settings, spread_over, spread_steps, take_steps

LAYOUTS = [
    {"expert": expert, "shard": shard, "replicate": replicate}
    for expert, shard, replicate in itertools.product((1, 2, 4, 8), repeat=3)
    if expert * shard * replicate in (2, 4, 8)
]
MUON = {"optimizer": {"name": "muon", "matrix_learning_rate": 1e-3, "matrix_products": "fp32", "clip_norm": 0.5}}


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
        (MUON, {"expert": 2, "shard": 2, "zero": 2}),
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
