"""Whole runs by several processes: what they write, how they stop, and what all of them do when one is in trouble."""

import os
import signal
from pathlib import Path

import pytest
import torch
from processes import run_processes

from benthic import api
from benthic.errors import InputError
from benthic.parallel.open import open_world
from benthic.train import loop
from benthic.train.checkpoint import load
from benthic.train.metrics import read_metrics
from benthic.train.objective import Objective
from benthic.train.signals import Interrupted

MEASURED = {"tokens_per_s", "share_of_gemm_peak", "seconds", "processor_seconds", "bytes_sent"}


def trained(rank, config, out, fault=None, at=()):
    """Train, with a fault on rank 1 in the passes that have these numbers; the bits per byte, or the exit status."""
    loop.measure_gemm_gflops = lambda *of: 100.0
    if rank == 1 and fault is not None:
        _break(fault, at)
    try:
        return api.train(config, out).bits_per_byte
    except Interrupted as stop:
        return stop.code


def _break(fault, at):
    forward, count = Objective.forward, 0

    def broken(*arguments):
        nonlocal count
        count += 1
        losses = forward(*arguments)
        if count in at and fault == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        if count in at and fault == "not a number":
            return losses._replace(balance=losses.balance * float("nan"))
        if count in at and fault == "spike":
            return losses._replace(cross_entropy_K=losses.cross_entropy_K * 1e4)
        return losses

    Objective.forward = broken


def spread(config, **parallel):
    return type(config).model_validate(config.model_dump(mode="json") | {"parallel": parallel})


def run(config, out, processes, *fault):
    return run_processes(trained, processes, config, out, *fault, group=False, timeout=250)


def course(out):
    return [
        {key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(out / "metrics.jsonl")
    ]


def assert_close(found, expected):
    """The same rows, and the same last checkpoint, in fp32."""
    for row, other in zip(course(found), course(expected), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            expected_value = other[key] if isinstance(value, str) else pytest.approx(other[key], rel=1e-3, abs=1e-4)
            assert value == expected_value, (row["step"], key)
    mine, theirs = (load(out / "checkpoints" / "pretrain" / "step-6") for out in (found, expected))
    for group, tensors in theirs.tensors.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(mine.tensors[group][name], tensor, atol=1e-4, rtol=1e-3)


@pytest.fixture
def config(tiny_run_config):
    return tiny_run_config(
        steps=6, checkpoint_every=2, validate_every=3, ema_decay=0.8, schedule={"batch_ramp": 0.6, "warmup": 0.5}
    )


def test_a_run_of_several_processes_is_that_of_one_whoever_goes_on_with_it(config, make_run):
    alone, several = make_run("alone"), make_run("several")
    run(config, alone, 1)
    # One process is told to stop: all of them do, after the step, and what they saved goes on on another layout.
    assert run(spread(config, expert=2, zero=3), several, 2, "terminated", (3,)) == [128 + signal.SIGTERM] * 2
    assert sorted(path.name for path in (several / "checkpoints" / "pretrain").iterdir()) == ["step-2", "step-3"]
    found = run(spread(config, shard=2), several, 2)
    assert found[0] == found[1]
    assert_close(several, alone)
    assert list((several / "model").glob("*.safetensors"))
    sent = [row["bytes_sent"] for row in read_metrics(several / "metrics.jsonl") if "bytes_sent" in row]
    assert "dispatch" in sent[0]
    assert "dispatch" not in sent[-1]


def test_what_is_not_a_number_on_one_process_stops_the_step_on_all(config, make_run):
    out = make_run()
    run(spread(config, shard=2), out, 2, "not a number", (3, 4))
    row = next(row for row in read_metrics(out / "metrics.jsonl") if "event" in row)
    assert row["event"] == "update skipped"
    assert row["step"] == 3
    first = sum(row["batch_size"] for row in course(out) if row["step"] < 3 and "batch_size" in row)
    assert row["sequences"][0] == first
    norms = [row["grad_norm"] for row in course(out) if "grad_norm" in row]
    assert [norm is None for norm in norms] == [False, False, True, False, False, False]


def test_all_processes_go_back_together(tiny_run_config, make_run):
    out = make_run()
    # As many steps as make a spike one, and a checkpoint before it.
    config = tiny_run_config(steps=20, checkpoint_every=10, on_spike="roll_back", spike_deviations=20.0)
    found = run(spread(config, expert=2), out, 2, "spike", (19, 20))
    assert found[0] == found[1]
    rows = read_metrics(out / "metrics.jsonl")
    event = next(row for row in rows if row.get("event") == "rolled back")
    assert event["rolled_back_from"] == 19
    assert event["step"] == 11
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))


def refused(rank, config):
    with pytest.raises(InputError) as caught, open_world(config) as world:
        world.first(lambda: _fail("of the main process"))
    return str(caught.value)


def _fail(message):
    raise InputError(message)


def test_what_one_process_refuses_all_do(config):
    assert run_processes(refused, 2, spread(config, shard=2), group=False) == ["of the main process"] * 2


def test_what_does_not_fit_is_refused_before_anything_is_written(config, tmp_path: Path):
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2"):
        api.train(spread(config, shard=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
