"""Spikes: the batch is run again and the spike told as transient or reproducible; then it is taken, skipped, or the
run goes back. However it is interrupted, a run that goes back ends bit for bit the same.
"""

import math
import os
import signal

import pytest
import torch

from benthic.data.batches import Batches
from benthic.train import loop
from benthic.train.checkpoint import committed, load
from benthic.train.incidents import Diverged, is_finite
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.signals import Interrupted


class Killed(BaseException):
    pass


def spoil(monkeypatch, sequences: set[int], factor: float, *, times: float = math.inf, before=None) -> None:
    """Multiply the hidden states of batches that begin with one of these sequences; ``before`` sees every sequence.

    What a batch does depends on its data alone, as with a spike of the data's making; with ``times``, only its first
    few forward passes are spoilt, as with a spike of the machine's making.
    """
    real_step, real_at, left, first = loop.train_step, Batches.at, times, 0

    def at(self, index, count):
        nonlocal first
        first = index
        return real_at(self, index, count)

    def hook(module, inputs, out):
        nonlocal left
        left -= 1
        return out * factor if left >= 0 else out

    def step(objective, *args, **kwargs):
        if before is not None:
            before(first)
        if first not in sequences:
            return real_step(objective, *args, **kwargs)
        handle = objective.model.transformer.norm.register_forward_hook(hook)
        try:
            return real_step(objective, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(Batches, "at", at)
    monkeypatch.setattr(loop, "train_step", step)


def rows(out) -> list[dict]:
    return read_metrics(out / "metrics.jsonl")


def events(out) -> list[dict]:
    return [row for row in rows(out) if "event" in row]


def weights(out) -> dict[str, torch.Tensor]:
    return load(committed(out / "checkpoints" / "pretrain")[-1]).tensors["model"]


def same(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


BATCH = 4
LENGTH = {"steps": 30, "checkpoint_every": 10, "validate_every": 30}


@pytest.mark.parametrize(("factor", "reason"), [(300.0, "loss spike"), (math.nan, "loss not finite")])
@pytest.mark.parametrize("policy", ["keep", "skip", "roll_back"])
def test_a_transient_fault_changes_nothing(tiny_run_config, make_run, monkeypatch, factor, reason, policy):
    whole, out = make_run("whole"), make_run()
    config = tiny_run_config(**LENGTH, on_spike=policy)
    train(config, whole)
    assert not events(whole)
    spoil(monkeypatch, {24 * BATCH}, factor, times=1)
    train(config, out)
    (event,) = events(out)
    assert (event["step"], event["event"], event["reason"], event["kind"]) == (
        25, "update run again", reason, "transient",
    )  # fmt: skip
    assert event["losses"][1] == next(row["loss"] for row in rows(whole) if row["step"] == 25)
    assert same(weights(out), weights(whole))


def test_a_reproducible_spike_is_kept_by_default(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    spoil(monkeypatch, {24 * BATCH}, 300.0)
    train(tiny_run_config(**LENGTH), out)
    event = events(out)[0]
    assert (event["event"], event["kind"], event["sequences"]) == ("update kept", "reproducible", [96, 99])
    assert event["losses"][0] == event["losses"][1] > 5 * rows(out)[23]["loss"]


def test_a_reproducible_spike_is_skipped_if_so_set(tiny_run_config, make_run, monkeypatch):
    out, clean = make_run(), make_run("clean")
    config = tiny_run_config(**LENGTH, on_spike="skip")
    # The same run with a batch that yields NaN, which is never learned from.
    with monkeypatch.context() as patch:
        spoil(patch, {24 * BATCH}, math.nan)
        train(config, clean)
    spoil(monkeypatch, {24 * BATCH}, 300.0)
    train(config, out)
    (event,) = events(out)
    assert (event["event"], event["kind"]) == ("update skipped", "reproducible")
    assert same(weights(out), weights(clean))


def test_three_skipped_in_a_row_end_the_run(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    spoil(monkeypatch, {24 * BATCH, 25 * BATCH, 26 * BATCH}, 300.0)
    with pytest.raises(Diverged, match=r"step 27: loss spike 3 times in a row, last in sequences 104 to 107"):
        train(tiny_run_config(**LENGTH, on_spike="skip"), out)


def test_a_process_may_hold_nothing_of_some_weights():
    model = torch.nn.Module()
    model.register_parameter("nothing", torch.nn.Parameter(torch.empty(0, 4)))
    assert is_finite(model)
    model.further = torch.nn.Linear(2, 2)
    assert is_finite(model)
    model.further.weight.data[0, 1] = math.nan
    assert not is_finite(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("damaged_after", [3, 4])
def test_damaged_weights_are_not_saved_and_leave_what_was(tiny_run_config, make_run, monkeypatch, value, damaged_after):
    """Losses and gradients of a step say nothing of the weights that it leaves, and only the last save is kept."""
    out, whole = make_run(), make_run("whole")
    config = tiny_run_config(steps=6, checkpoint_every=1, keep_checkpoints=1, validate_every=100)
    real, count = loop.train_step, 0

    def damaging(objective, *args, **kwargs):
        nonlocal count
        count += 1
        report = real(objective, *args, **kwargs)
        if count == damaged_after:
            with torch.no_grad():
                next(objective.model.transformer.layers[1].parameters()).view(-1)[0] = value
        return report

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", damaging)
        with pytest.raises(Diverged, match=rf"step {damaged_after}: weights are not finite"):
            train(config, out)
    assert [path.name for path in committed(out / "checkpoints" / "pretrain")] == [f"step-{damaged_after - 1}"]
    train(config, out)
    train(config, whole)
    left, right = (load(run / "checkpoints" / "pretrain" / "step-6") for run in (out, whole))
    for name, tensor in right.tensors["model"].items():
        assert torch.equal(left.tensors["model"][name], tensor)


def test_rolling_back_passes_over_what_was_read_since_the_checkpoint(tiny_run_config, make_run, monkeypatch):
    out, read = make_run(), []
    spoil(monkeypatch, {24 * BATCH}, 300.0, before=read.append)
    train(tiny_run_config(**LENGTH, on_spike="roll_back"), out)
    # Steps 21 to 25 led to the spike; after it, step 21 and all that follow read what was not read before.
    assert read == list(range(0, 25 * BATCH, BATCH)) + list(range(25 * BATCH, 35 * BATCH, BATCH))
    (event,) = events(out)
    assert event["event"] == "rolled back"
    assert (event["step"], event["rolled_back_from"], event["sequences"]) == (21, 25, [96, 99])
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 31))
    state = load(committed(out / "checkpoints" / "pretrain")[-1]).state
    assert (state["step"], state["sequences_passed_over"]) == (30, 5 * BATCH)


def test_rolling_back_before_the_first_checkpoint_begins_anew(tiny_run_config, make_run, monkeypatch):
    out, read = make_run(), []
    spoil(monkeypatch, {18 * BATCH}, 300.0, before=read.append)
    train(tiny_run_config(**{**LENGTH, "checkpoint_every": 30}, on_spike="roll_back"), out)
    assert read == list(range(0, 19 * BATCH, BATCH)) + list(range(19 * BATCH, 49 * BATCH, BATCH))
    assert rows(out)[0]["rolled_back_from"] == 19


def test_spikes_that_do_not_end_end_the_run(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    spoil(monkeypatch, set(range(24 * BATCH, 100 * BATCH)), 300.0)
    with pytest.raises(Diverged, match=r"step 21: loss spike after 3 roll-backs to step 20"):
        train(tiny_run_config(**LENGTH, on_spike="roll_back"), out)
    assert [event["rolled_back_from"] for event in events(out)] == [25, 21, 21]


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("moments", [[23 * BATCH], [24 * BATCH], [27 * BATCH], [12 * BATCH, 22 * BATCH, 31 * BATCH]])
def test_an_interrupted_run_goes_back_to_the_same_place(tiny_run_config, make_run, monkeypatch, how, moments):
    config = tiny_run_config(**LENGTH, on_spike="roll_back", keep_checkpoints=1, ema_decay=0.9)
    whole, out, left = make_run("whole"), make_run(), set(moments)
    with monkeypatch.context() as patch:
        spoil(patch, {24 * BATCH, 33 * BATCH}, 300.0)
        train(config, whole)
    assert len(events(whole)) == 2

    def interrupt(first: int) -> None:
        if first in left:
            left.discard(first)
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    spoil(monkeypatch, {24 * BATCH, 33 * BATCH}, 300.0, before=interrupt)
    for _ in moments:
        with pytest.raises((Killed, Interrupted)):
            train(config, out)
    train(config, out)
    course = [[(row["step"], row.get("loss"), row.get("event")) for row in rows(run)] for run in (out, whole)]
    assert course[0] == course[1]
    ended = [load(committed(run / "checkpoints" / "pretrain")[-1]) for run in (out, whole)]
    assert ended[0].state == ended[1].state
    for group, tensors in ended[1].tensors.items():
        assert same(ended[0].tensors[group], tensors), group
