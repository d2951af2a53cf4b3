"""What trackers are sent, read back from TensorBoard's files and from stand-ins for the others."""

import math
import sys
from types import SimpleNamespace

import pytest

from benthic.errors import InputError, MissingExtra
from benthic.train.loop import train
from benthic.train.metrics import MetricsLog, read_metrics
from benthic.train.track import numbers, open_trackers

SETTINGS = {"train": {"steps": 3}}


def test_only_finite_numbers_are_sent_and_lists_by_place():
    row = {"step": 4, "loss": 1.5, "mtp_losses": [2.0, math.nan], "grad_norm": math.inf, "dead_experts": 3,
           "none": None, "text": "x"}  # fmt: skip
    assert numbers(row) == {"loss": 1.5, "mtp_losses/0": 2.0, "dead_experts": 3}


class Recorder:
    """Stands for wandb's or trackio's module and its run at once."""

    def __init__(self) -> None:
        self.inits, self.logged, self.finished, self.metrics = [], [], 0, []

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_under_its_name(tmp_path, monkeypatch, name):
    fake = Recorder()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=fake.init))
    for step in (0, 1):
        trackers = open_trackers([name], tmp_path, step, SETTINGS, pytest.fail)
        with MetricsLog(tmp_path / "metrics.jsonl", "pretrain", step, trackers=trackers) as log:
            log.write({"step": step + 1, "loss": 1.0 + step})
            log.write({"step": step + 1, "event": "update skipped", "losses": [1.0, 2.0]})
    first, second = fake.inits
    assert first == second
    assert first["name"].startswith(f"{tmp_path.name}-")
    assert (first["resume"], first["config"], first["project"]) == ("allow", SETTINGS, "benthic")
    if name == "wandb":
        assert first["id"] == first["name"]
        assert fake.metrics == [("*", "step")] * 2
        assert fake.logged == [(None, {"step": 1, "loss": 1.0}), (None, {"step": 2, "loss": 2.0})]
    else:
        assert fake.logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]
    assert fake.finished == 2


def test_runs_of_the_same_name_are_told_apart(tmp_path, monkeypatch):
    fake = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        open_trackers(["trackio"], tmp_path / folder, 0, SETTINGS, pytest.fail)
    assert fake.inits[0]["name"] != fake.inits[1]["name"]


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(
    tiny_run_config, make_run, monkeypatch, capfd, fails
):  # fmt: skip
    fake, calls = Recorder(), []

    def fail(*arguments, **settings):
        calls.append(arguments)
        raise ConnectionError("no such\nhost")

    monkeypatch.setattr(fake, fails, fail)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    out = make_run()
    train(tiny_run_config(track=["trackio"], steps=3), out)
    assert len(calls) == 1
    told = "trackio failed, and is left out from here on: no such host; metrics.jsonl has all"
    assert capfd.readouterr().err.count(told) == 1
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row] == [1, 2, 3]
    assert (out / "checkpoints" / "pretrain" / "step-3").is_dir()


def test_a_tracker_that_does_not_start_is_told_in_one_line(tiny_run_config, make_run, monkeypatch):
    fake = Recorder()
    monkeypatch.setattr(fake, "init", lambda **settings: 1 / 0)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with pytest.raises(InputError, match=r"train\.track: trackio does not start: division by zero"):
        train(tiny_run_config(track=["trackio"], steps=3), make_run())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_told_before_anything_is_written(tiny_run_config, make_run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    out = make_run()
    with pytest.raises(MissingExtra, match=rf"{name} is not installed; run: pip install 'benthic\[track\]'"):
        train(tiny_run_config(track=[name]), out)
    assert {path.name for path in out.iterdir()} == {"data", "tokenizer"}


def test_tensorboard_shows_the_run_that_was_interrupted_and_went_on(tiny_run_config, make_run, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = make_run()
    config = tiny_run_config(steps=6, checkpoint_every=2, track=["tensorboard"])
    real_row, count = MetricsLog.write, 0

    def interrupted(self, row):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        real_row(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
    train(config, out)
    shown = accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert "mtp_losses/0" in shown.Tags()["scalars"]
    assert "validation_bits_per_byte" in shown.Tags()["scalars"]
