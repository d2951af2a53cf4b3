"""A run that is interrupted and called again ends bit for bit as one that was not."""

import os
import shutil
import signal
import time

import pytest
import torch
from interrupted import Killed, assert_same_run, at_step, course, ended, kill

from benthic.config.load import load_run_config
from benthic.errors import InputError
from benthic.model.initial import InitialWeights
from benthic.train import loop
from benthic.train.checkpoint import CheckpointFailed, committed, load, save
from benthic.train.loop import train
from benthic.train.signals import Interrupted

KINDS = {
    "adamw": {},
    "muon": {"optimizer": {"name": "muon", "learning_rate": 3e-3}},
    "ramp, average, micro-batches": {
        "schedule": {"batch_ramp": 0.6},
        "ema_decay": 0.9,
        "batch_size": 8,
        "micro_batch_size": 2,
    },
    "documents": {"mask_documents": True},
    "mtp from the middle on": {"schedule": {"mtp_loss_weight": 0.0, "mtp_late_start": 0.5}},
    "mtp in every fifth step": {"schedule": {"mtp_every": 5}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_exactly(tiny_run_config, make_run, monkeypatch, kind):
    config = tiny_run_config(checkpoint_every=6, **KINDS[kind])
    whole, out = make_run("whole"), make_run("killed")
    result = train(config, whole)
    with monkeypatch.context() as patch:
        at_step(patch, 15, kill)
        with pytest.raises(Killed):
            train(config, out)
    resumed = train(config, out)
    assert resumed.bits_per_byte == result.bits_per_byte
    assert [row["step"] for row in course(out) if "loss" in row] == list(range(1, 21))
    assert_same_run(out, whole)


def test_a_run_that_goes_on_draws_no_weights(tiny_run_config, make_run, monkeypatch):
    config, out, drawn = tiny_run_config(steps=4, checkpoint_every=2), make_run(), []
    fill = InitialWeights.fill

    def noted(weights, *arguments, **named):
        drawn.append(arguments)
        fill(weights, *arguments, **named)

    monkeypatch.setattr(InitialWeights, "fill", noted)
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            train(config, out)
    assert len(drawn) == 1
    train(config, out)
    assert len(drawn) == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on(
    tiny_run_config, make_run, monkeypatch, number, status
):
    config = tiny_run_config()
    whole, out = make_run("whole"), make_run("stopped")
    train(config, whole)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted) as stopped:
            train(config, out)
    assert stopped.value.code == status
    assert signal.getsignal(number) == before
    assert ended(out).state["step"] == 7
    train(config, out)
    assert_same_run(out, whole)


def test_a_second_ctrl_c_acts_at_once(tiny_run_config, make_run, monkeypatch):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    out = make_run()
    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run_config(), out)
    assert not committed(out / "checkpoints" / "pretrain")


def test_a_finished_run_returns_what_it_had(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    first = train(tiny_run_config(), out)
    before = course(out)
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: pytest.fail("trained again"))
    again = train(tiny_run_config(), out)
    assert again.bits_per_byte == first.bits_per_byte
    assert course(out) == before
    for left, right in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("began", [torch.bfloat16, torch.float32])
def test_muon_goes_on_in_the_precision_it_began_with_on_any_machine(tiny_run_config, make_run, monkeypatch, began):
    other = torch.float32 if began == torch.bfloat16 else torch.bfloat16
    config = tiny_run_config(**KINDS["muon"])
    whole, out = make_run("whole"), make_run("moved")
    monkeypatch.setattr("benthic.train.optimizer.fast_matmul_dtype", lambda device: began)
    train(config, whole)
    with monkeypatch.context() as patch:
        at_step(patch, 15, kill)
        with pytest.raises(Killed):
            train(config, out)
    monkeypatch.setattr("benthic.train.optimizer.fast_matmul_dtype", lambda device: other)
    train(config, out)
    assert_same_run(out, whole)
    recorded = load_run_config(out / "config.toml").train.optimizer.matrix_products
    assert recorded == ("bf16" if began == torch.bfloat16 else "fp32")


def test_the_resolved_settings_resume_too(tiny_run_config, make_run):
    out = make_run()
    train(tiny_run_config(steps=3), out)
    train(load_run_config(out / "config.toml"), out)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"steps": 21}, r"train.steps: saved 20, given 21"),
        ({"model": {"hidden_size": 32}}, r"model.hidden_size: saved 64, given 32"),
        ({"schedule": {"warmup": 0.5}}, r"train.schedule.warmup: saved 0.02, given 0.5"),
        ({"mask_documents": True}, r"data.mask_documents: saved False, given True"),
        ({"optimizer": {"name": "muon", "learning_rate": 3e-3}}, r"train.optimizer.name: saved adamw, given muon"),
        ({"seed": 1}, r"train.seed: saved 0, given 1"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tiny_run_config, make_run, changes, complaint):
    out = make_run()
    train(tiny_run_config(validate_every=100), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=complaint) as refused:
        train(tiny_run_config(**{"validate_every": 100, **changes}), out)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_setting_that_the_saving_version_lacked_had_its_default(tiny_run_config, make_run):
    out = make_run()
    train(tiny_run_config(steps=2), out)
    path = committed(out / "checkpoints" / "pretrain")[-1]
    loaded = load(path)
    for settings in (loaded.state["run"]["requested"], loaded.state["run"]["resolved"]):
        del settings["train"]["ema_decay"], settings["train"]["optimizer"]["clip_norm"], settings["data"]["seed"]
    shutil.rmtree(path)
    save(path.parent, 2, loaded, keep=1)
    train(tiny_run_config(steps=2), out)
    with pytest.raises(InputError, match=r"train.ema_decay: saved 0.0, given 0.5"):
        train(tiny_run_config(steps=2, ema_decay=0.5), out)


@pytest.mark.parametrize("part", ["data", "tokenizer"])
def test_other_data_or_tokenizer_is_refused(tiny_run_config, make_run, texts, tmp_path, part):
    from benthic.data.prepare import prepare

    out = make_run()
    train(tiny_run_config(), out)
    other = tmp_path / "other"
    prepare(tiny_run_config().data.model_copy(update={"validation_fraction": 0.3}), 300, other)
    for name in ("data", "tokenizer") if part == "data" else ("tokenizer",):
        (out / name).unlink()
        (out / name).symlink_to(other / name)
    expected = r"corpus.data: saved \w+, given \w+" if part == "data" else "not the tokenizer"
    with pytest.raises(InputError, match=expected):
        train(tiny_run_config(), out)


def test_what_does_not_change_the_course_may_change(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    with monkeypatch.context() as patch:
        at_step(patch, 12, kill)
        with pytest.raises(Killed):
            train(tiny_run_config(), out)
    train(tiny_run_config(checkpoint_every=4, keep_checkpoints=3, validate_every=5, validation_tokens=64), out)
    steps = [path.name for path in committed(out / "checkpoints" / "pretrain")]
    assert steps == ["step-12", "step-16", "step-20"]
    assert [row["step"] for row in course(out) if "loss" not in row] == [8, 15, 20]


def test_a_failed_save_says_so_and_leaves_the_last_checkpoint(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    with monkeypatch.context() as patch:

        def fill_the_disk() -> None:
            while not committed(out / "checkpoints" / "pretrain"):  # step 10's, in the background
                time.sleep(0.01)
            patch.setattr("benthic.train.checkpoint.save_file", full_disk)

        at_step(patch, 12, fill_the_disk)
        with pytest.raises(CheckpointFailed, match=r"step-20.*No space left"):
            train(tiny_run_config(), out)
    assert ended(out).state["step"] == 10


def full_disk(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "change",
    [
        {"run": []},
        {"run": {}},
        {"step": None},
        {"step": "2"},
        {"bits_per_byte": "low"},
        {"step": 10**9},
        {"step": -1},
    ],
)
def test_a_checkpoint_of_no_use_is_refused_although_its_hashes_are_right(tiny_run_config, make_run, change):
    out = make_run()
    train(tiny_run_config(steps=2), out)
    path = committed(out / "checkpoints" / "pretrain")[-1]
    loaded = load(path)
    shutil.rmtree(path)
    save(path.parent, 2, loaded._replace(state={**loaded.state, **change}), keep=1)
    with pytest.raises(InputError, match=r"step-2/state.json"):
        train(tiny_run_config(steps=2), out)
