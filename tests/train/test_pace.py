"""A run whose steps were planned while the machine was busy begins again with as many as fit, and as if it were new."""

import json
import os
import signal

import pytest
import torch
from interrupted import course

from benthic.train import calibrate
from benthic.train.checkpoint import committed
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.pace import Pace, TimeGiven
from benthic.train.signals import Interrupted
from benthic.train.work import Spent

LATE_MTP = {"mtp_loss_weight": 0.0, "mtp_late_start": 0.5}


@pytest.fixture
def measured(monkeypatch):
    """Seconds that a step is said to take, when asked for the first time."""
    said = []
    monkeypatch.setattr(calibrate, "seconds_per_step", lambda *args: said.pop())
    return said


@pytest.fixture
def real(monkeypatch):
    """Sets how many seconds a step seems to take while a run goes."""

    def pace(seconds):
        def seconds_per_flop(self):
            return seconds * len(self._recent) / sum(spent.flops for _, spent in self._recent)

        monkeypatch.setattr(Pace, "seconds_per_flop", property(seconds_per_flop))

    return pace


def test_steps_planned_while_the_machine_was_busy_are_planned_again(tiny_run_config, make_run, measured, real, capfd):
    measured += [4.0]
    real(0.6)
    planned = tiny_run_config(steps=None, minutes=2.0, checkpoint_every=1000, schedule=LATE_MTP)
    out = make_run()
    again = train(planned, out)
    steps = again.config.train.steps
    assert 120 < steps < 200  # of two minutes, next to nothing was lost
    assert capfd.readouterr().err.count("begins again with") == 1
    plain = make_run("plain")
    expected = train(tiny_run_config(steps=steps, checkpoint_every=1000, schedule=LATE_MTP), plain)
    for left, right in zip(again.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert course(out) == course(plain)
    assert [path.name for path in committed(out / "checkpoints" / "pretrain")] == [f"step-{steps}"]
    spent = json.loads((out / "ledger.json").read_text())["stages"]["pretrain"]
    assert spent["tokens"] == [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row][-1]["tokens"]
    # What was asked for is minutes, and the finished run is the one that was asked for.
    assert train(planned, out).config.train.steps == steps


@pytest.mark.parametrize(
    ("a_step", "settings"),
    [
        (2.0, {}),
        (1.5, {}),
        (1e-6, {"checkpoint_every": 20}),
        # Half of the time is validation's, which no step tells of.
        (2.0, {"validate_every": 5, "validation_tokens": 3840, "ema_decay": 0.9}),
    ],
    ids=["as planned", "a little faster", "something is saved", "with validations"],
)
def test_a_run_goes_on_where(tiny_run_config, make_run, measured, real, capfd, a_step, settings):
    measured += [2.0]
    real(a_step)
    config = tiny_run_config(**{"steps": None, "minutes": 1.5, "checkpoint_every": 1000} | settings)
    trained = train(config, make_run())
    assert 20 < trained.config.train.steps <= 45
    assert capfd.readouterr().err.count("pretrain 1/") == 1


def test_frequent_validations_are_no_reason_to_begin_again(tiny_run_config, make_run, capfd):
    """Everything as it is: the plan counts validations, and so does what it is compared with."""
    config = tiny_run_config(steps=None, minutes=0.1, validate_every=10, validation_tokens=8192, checkpoint_every=10**6)
    trained = train(config, make_run())
    assert capfd.readouterr().err.count("pretrain 1/") == 1
    assert trained.config.train.steps > 20


def test_a_signal_on_the_way_to_a_new_plan_is_heeded(tiny_run_config, make_run, measured, real, monkeypatch):
    measured += [4.0]
    real(0.6)
    leave = TimeGiven.steps_worth_beginning_again

    def signalled(self, config, seconds):
        os.kill(os.getpid(), signal.SIGTERM)
        return leave(self, config, seconds)

    monkeypatch.setattr(TimeGiven, "steps_worth_beginning_again", signalled)
    with pytest.raises(Interrupted) as stopped:
        train(tiny_run_config(steps=None, minutes=2.0, checkpoint_every=1000), make_run())
    assert "before anything" in stopped.value.message


def test_it_is_worth_it_where_half_as_many_again_would_fit(tiny_run_config):
    config = tiny_run_config(steps=100, validate_every=10**6)
    assert TimeGiven(10).steps_worth_beginning_again(config, 390) == pytest.approx(154, abs=1)
    assert TimeGiven(10).steps_worth_beginning_again(config, 410) is None
    assert TimeGiven(None).steps_worth_beginning_again(config, 1e-9) is None
    assert TimeGiven(0.0).steps_worth_beginning_again(config, 1e-9) is None
    ramp = tiny_run_config(steps=100, validate_every=10**6, batch_size=40, schedule={"batch_ramp": 1.0})
    assert TimeGiven(10).steps_worth_beginning_again(ramp, 390) == pytest.approx(154, abs=1)


def test_the_pace_is_that_of_the_last_steps():
    pace = Pace()
    pace.add(100.0, Spent(1, 1.0))
    for seconds in [1.0, 3.0] * 10:
        pace.add(seconds, Spent(50, 4e9))
    assert pace.seconds_per_token == pytest.approx(2 / 50)
    assert pace.seconds_per_flop == pytest.approx(2 / 4e9)
