"""A run whose steps were planned while the machine was busy begins again with as many as fit, and as if it were new."""

import json

import pytest
import torch
from interrupted import course

from benthic.train import calibrate
from benthic.train.checkpoint import committed
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.pace import Pace, TimeGiven
from benthic.train.work import Spent

LATE_MTP = {"mtp_loss_weight": 0.0, "mtp_late_start": 0.5}


@pytest.fixture
def measured(monkeypatch):
    """Seconds that a step is said to take, one after another; the last one for good."""
    said = []
    monkeypatch.setattr(calibrate, "seconds_per_step", lambda *args: said.pop(0) if len(said) > 1 else said[0])
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
    measured += [4.0, 0.6]
    real(0.6)
    planned = tiny_run_config(steps=None, minutes=2.0, checkpoint_every=1000, schedule=LATE_MTP)
    out = make_run()
    again = train(planned, out)
    steps = again.config.train.steps
    assert 120 < steps < 200  # of two minutes, next to nothing was lost
    assert capfd.readouterr().err.count("begins again with more steps") == 1
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
    ("a_step", "checkpoint_every", "begun"),
    [(2.0, 1000, 1), (1.5, 1000, 1), (1e-6, 20, 1), (1e-6, 1000, 4)],
    ids=["as planned", "a little faster", "something is saved", "measured as slow again and again"],
)
def test_a_run_goes_on_where(tiny_run_config, make_run, measured, real, capfd, a_step, checkpoint_every, begun):
    measured += [2.0]
    real(a_step)
    config = tiny_run_config(steps=None, minutes=1.5, checkpoint_every=checkpoint_every)
    trained = train(config, make_run())
    assert 20 < trained.config.train.steps <= 45
    assert capfd.readouterr().err.count("pretrain 1/") == begun


def test_time_is_wasted_where_half_as_much_again_would_fit():
    given = TimeGiven(10)
    assert given.is_wasted(390)
    assert not given.is_wasted(410)
    assert given.minutes_left() == pytest.approx(10, abs=0.01)
    assert not TimeGiven(None).is_wasted(1e-9)


def test_the_pace_is_that_of_the_last_steps():
    pace = Pace()
    pace.add(100.0, Spent(1, 1.0))
    for seconds in [1.0, 3.0] * 10:
        pace.add(seconds, Spent(50, 4e9))
    assert pace.seconds_per_token == pytest.approx(2 / 50)
    assert pace.seconds_per_flop == pytest.approx(2 / 4e9)
