"""Runs over the stages of a pipeline beside the same on one process: losses, norms, loads and all tensors are equal."""

import pytest
from processes import run_processes
from spread import ALONE, InFloat32, InFloat64, largest_difference, settings, spread_over, spread_steps, take_steps

EXACT, CLOSE = 1e-9, 1e-4


def spread_all(rank, configs, architecture):
    """Several runs in one group of processes."""
    return [spread_steps(rank, config, architecture) for config in configs]


def check(architecture, tolerance, *cases):
    """Each case is a layout, and settings that all of its processes and one alone have."""
    configs = [(settings(**{"steps": 3, **usual}), layout) for layout, usual in cases]
    processes = {spread_over(config, **layout).parallel.processes for config, layout in configs}
    together = [spread_over(config, **layout) for config, layout in configs]
    outcomes = run_processes(spread_all, *processes, together, architecture, timeout=250)[0]
    for (config, layout), outcome in zip(configs, outcomes, strict=True):
        alone = take_steps(config, ALONE, architecture)
        assert largest_difference(alone, outcome) < tolerance, layout
        assert outcome.loads == alone.loads, layout


def layers(count, **further):
    return {"model": {"num_hidden_layers": count, **further}}


def test_two_stages_by_every_schedule():
    late_mtp = {"mtp_late_start": 0.5, "mtp_late_loss_weight": 0.0}
    every_other = {"schedule": {"mtp_every": 2}, "steps": 4}
    check(
        InFloat64(), EXACT,
        ({"pipeline": 2, "schedule": "1f1b"}, {"steps": 4, "schedule": late_mtp}),
        ({"pipeline": 2, "schedule": "interleaved"}, layers(3) | {"recompute": True}),
        ({"pipeline": 2, "schedule": "zbv"}, layers(3, num_nextn_predict_layers=0) | {"batch_size": 7}),
        ({"pipeline": 2, "schedule": "dualpipev"}, layers(4) | {"optimizer": {"name": "muon"}} | every_other),
    )  # fmt: skip


def test_four_processes_with_other_axes():
    check(
        InFloat64(), EXACT,
        ({"pipeline": 2, "expert": 2, "schedule": "dualpipev"}, layers(4, num_nextn_predict_layers=2)),
        ({"pipeline": 2, "shard": 2, "schedule": "zbv"}, layers(4) | {"recompute": True}),
        ({"pipeline": 4, "schedule": "1f1b"}, layers(4)),
    )  # fmt: skip


def test_in_fp8():
    fp8 = {"compute": "fp8", "steps": 2, "batch_size": 4}
    check(InFloat32(), CLOSE, ({"pipeline": 2, "schedule": "zbv"}, layers(3) | fp8))


@pytest.mark.slow
def test_in_bf16_gradients_differ_by_the_order_of_sums_only():
    # The embedding's, rounded, come from two uses; and Adam's first steps are of one size whatever the gradients.
    usual = layers(3) | {"compute": "bf16", "steps": 4}
    config = settings(**usual)
    layout = spread_over(config, pipeline=2, shard=2, schedule="zbv")
    outcome, *_ = run_processes(spread_steps, 4, layout, InFloat32())
    alone = take_steps(config, ALONE, InFloat32())
    for ours, theirs in zip(outcome.losses, alone.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)
