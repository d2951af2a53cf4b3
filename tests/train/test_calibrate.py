"""Measuring decides precision and length of a run, and leaves nothing else behind."""

import pytest
import torch

from benthic.data.batches import Batches
from benthic.data.shards import TokenStore
from benthic.train import calibrate
from benthic.train.calibrate import affordable_steps, resolve, seconds_per_step
from benthic.train.loop import train


@pytest.fixture
def batches(prepared) -> Batches:
    return Batches(TokenStore(prepared / "data", "train"), 32, 2)


def with_precision(config, compute):
    return config.model_copy(update={"precision": config.precision.model_copy(update={"compute": compute})})


@pytest.mark.parametrize(("fp32", "bf16", "expected"), [(1.0, 2.0, "fp32"), (2.0, 1.0, "bf16")])
def test_auto_takes_the_faster(tiny_run_config, batches, monkeypatch, fp32, bf16, expected):
    times = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(calibrate, "seconds_per_step", lambda config, batches, compute, **_: times[compute])
    resolved = resolve(with_precision(tiny_run_config(), "auto"), batches)
    assert resolved.precision.compute == expected
    assert resolved.train == tiny_run_config().train


def test_what_is_given_is_not_measured(tiny_run_config, batches, monkeypatch):
    monkeypatch.setattr(calibrate, "seconds_per_step", lambda *args: pytest.fail("measured"))
    assert resolve(tiny_run_config(), batches) == tiny_run_config()


def test_minutes_become_steps(tiny_run_config, batches, monkeypatch):
    monkeypatch.setattr(calibrate, "seconds_per_step", lambda *args: 0.5)
    monkeypatch.setattr(calibrate, "PROBED_TOKENS", 128)
    config = tiny_run_config(steps=None, minutes=2.0, validate_every=10, validation_tokens=256)
    resolved = resolve(config, batches)
    assert resolved.train.minutes is None
    # A validation reads three batches, and so costs as much as one step: eleven steps' time for ten.
    assert resolved.train.steps == round(240 * 10 / 11)
    assert resolve(config, batches, held_out_tokens=128).train.steps == round(240 * 10 / (10 + 2 / 3))
    averaged = tiny_run_config(steps=None, minutes=2.0, validate_every=10, validation_tokens=256, ema_decay=0.9)
    assert resolve(averaged, batches).train.steps == round(240 * 10 / (10 + 5 / 3))


def test_parts_of_a_run_count_by_their_share(tiny_run_config, batches, monkeypatch):
    monkeypatch.setattr(calibrate, "_median_seconds", lambda trial, mtp_weight, budget: 2.0 if mtp_weight else 1.0)
    late = {"mtp_loss_weight": 0.0, "mtp_late_loss_weight": 0.3, "mtp_late_start": 0.75}
    assert seconds_per_step(tiny_run_config(schedule=late), batches, "fp32") == pytest.approx(1.25)
    sometimes = late | {"mtp_every": 5}
    assert seconds_per_step(tiny_run_config(schedule=sometimes), batches, "fp32") == pytest.approx(1.05)
    assert seconds_per_step(tiny_run_config(schedule={"mtp_every": 4}), batches, "fp32") == pytest.approx(1.25)
    assert seconds_per_step(tiny_run_config(), batches, "fp32") == 2.0
    never = {"mtp_loss_weight": 0.0, "mtp_late_loss_weight": 0.0}
    assert seconds_per_step(tiny_run_config(schedule=never), batches, "fp32") == 1.0


def test_a_batch_ramp_affords_more_steps(tiny_run_config):
    plain = tiny_run_config(steps=None, minutes=2.0, batch_size=40)
    ramp = tiny_run_config(steps=None, minutes=2.0, batch_size=40, schedule={"batch_ramp": 1.0})
    # From a fifth of the batch to all of it: ln(5) / 0.8 steps in place of one.
    assert affordable_steps(ramp, 1.0, 100.0) == pytest.approx(2.01 * affordable_steps(plain, 1.0, 100.0), rel=0.01)


def test_measuring_leaves_no_trace_in_the_run(tiny_run_config, make_run):
    measured = train(with_precision(tiny_run_config(steps=None, minutes=0.0001), "auto"), make_run("measured"))
    steps, compute = measured.config.train.steps, measured.config.precision.compute
    plain = train(with_precision(tiny_run_config(steps=steps), compute), make_run("plain"))
    for left, right in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_measured_run_goes_on_with_what_was_measured(tiny_run_config, make_run, monkeypatch):
    out, config = make_run(), with_precision(tiny_run_config(steps=None, minutes=0.0001), "auto")
    first = train(config, out)
    monkeypatch.setattr(calibrate, "seconds_per_step", lambda *args: pytest.fail("measured again"))
    assert train(config, out).config == first.config
