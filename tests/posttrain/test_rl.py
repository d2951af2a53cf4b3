"""The stage of reinforcement learning on a tiny model: that it learns, resumes bit for bit, and says what it does."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from benthic import api
from benthic.config.schema import RunConfig
from benthic.posttrain import rl as stage
from benthic.posttrain.asking import Asking
from benthic.train import loop
from benthic.train.checkpoint import load
from benthic.train.metrics import read_metrics
from benthic.train.signals import Interrupted


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_run_config, texts) -> Path:
    """A model that has hardly been trained, and has a context long enough for problems."""
    from benthic.data.prepare import prepare

    out = tmp_path_factory.mktemp("base")
    config = tiny_run_config(steps=4, validate_every=4, checkpoint_every=4)
    prepare(config.data, config.model.vocab_size, out)
    api.train(config, out)
    return out


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    """What to say to each of forty questions: their last letter."""
    path = tmp_path_factory.mktemp("problems") / "letters.jsonl"
    rows = [{"prompt": f"{first}{last}", "answer": last} for first in "abcdefghij" for last in "deep"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


_REWARD = """
def vowels(prompt, answer, problem):
    return 0.5 + 0.5 * sum(letter in "aeiou" for letter in answer) / max(1, len(answer))
"""


@pytest.fixture
def config(base, problems, tmp_path_factory, monkeypatch):
    """Rewards for ending at all, and for vowels: what a model can find out that has hardly been trained."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards_of_test.py").write_text(_REWARD)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def build(**settings) -> RunConfig:
        given = {
            "problems": [{"file": str(problems), "rewards": [{"name": "rewards_of_test:vowels"}]}],
            "steps": 6, "prompts": 4, "group_size": 4, "max_new_tokens": 24, "learning_rate": 1e-3, "held_out": 10,
            "held_out_quick": 5, "validate_every": 3, "checkpoint_every": 2, "kl_weight": 0.05, "mtp_loss_weight": 0.3,
        }  # fmt: skip
        settings = {"posttrain": {"base": str(base), "rl": {**given, **settings}}}
        trained = json.loads(json.dumps(_config_of(base).model_dump(mode="json")))
        return RunConfig.model_validate({**trained, **settings})

    return build


def _config_of(run: Path) -> RunConfig:
    from benthic.config.load import load_run_config

    return load_run_config(run / "config.toml")


def _rows(out):
    """Metrics without what the clock says."""
    rows = read_metrics(out / "metrics.jsonl", "rl")
    clocks = ("second", "tokens_per_s", "share_of_gemm_peak")
    return [{key: value for key, value in row.items() if not any(clock in key for clock in clocks)} for row in rows]


def test_a_run_has_figures_and_ends_with_a_model(config, tmp_path):
    trained = api.train(config(), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl", "rl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert row["mismatch"] < 1e-5
        assert 0 <= row["reward"] <= 1
        assert row["reward_by_source"] == {"letters": pytest.approx(row["reward"])}
        assert 0 <= row["groups_without_variance"] <= 4
        assert 0 <= row["answer_length"] <= 24
        assert row["kl"] >= 0
        assert row["entropy"] > 0
        assert len(row["mtp_losses"]) == 1
    assert any(row["groups_without_variance"] < 4 and row["reward"] > 0 for row in steps)
    assert steps[0]["kl"] < 1e-9  # the policy is its own reference still
    validations = [row for row in rows if "accuracy" in row]
    assert [row["step"] for row in validations] == [0, 3, 6]
    for kind in ("accuracy", "sampled_accuracy"):
        assert [row[kind]["letters"]["n"] for row in validations] == [10, 5, 10]
    assert trained.measure == "bits per byte of held-out text"
    assert (tmp_path / "model" / "config.json").is_file()
    assert json.loads((tmp_path / "ledger.json").read_text())["stages"]["rl"]["tokens"] == steps[-1]["tokens"]


@pytest.mark.parametrize("updates", [1, 3])
def test_interrupted_anywhere_it_goes_on_bit_for_bit(config, tmp_path, updates):
    settings = config(updates=updates, checkpoint_every=100)
    api.train(settings, tmp_path / "whole")
    for _ in range(2):  # after the second step, and after the fourth
        with pytest.raises(Interrupted), _stopping_after(2):
            api.train(settings, tmp_path / "parts")
    api.train(settings, tmp_path / "parts")
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")
    ends = [load(tmp_path / name / "checkpoints" / "rl" / "step-6") for name in ("whole", "parts")]
    for group in ("model", "optimizer"):
        for name, tensor in ends[0].tensors[group].items():
            assert torch.equal(tensor, ends[1].tensors[group][name]), name


def _stopping_after(steps):
    """A signal that comes during the last of so many steps."""
    original, done = loop.train_step, []

    def step(*arguments, **keywords):
        done.append(None)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    return mock.patch.object(loop, "train_step", step)


def test_answers_without_advantage_may_be_left_out(config, tmp_path):
    """Without a reference they change nothing, and are not computed with."""
    settings = config(kl_weight=0.0, mtp_loss_weight=0.0, steps=4)
    api.train(settings, tmp_path / "left_out")
    with mock.patch.object(stage, "with_advantage", lambda rollouts: rollouts):
        api.train(settings, tmp_path / "all")
    rows = [[row for row in _rows(tmp_path / name) if "loss" in row] for name in ("left_out", "all")]
    assert any(0 < row["groups_without_variance"] < 4 for row in rows[0])
    ends = [load(tmp_path / name / "checkpoints" / "rl" / "step-4").tensors["model"] for name in ("left_out", "all")]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_it_learns(config, tmp_path):
    api.train(
        config(steps=150, prompts=16, group_size=8, learning_rate=3e-3, kl_weight=0.0, validate_every=150), tmp_path
    )
    rows = read_metrics(tmp_path / "metrics.jsonl", "rl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-20:]) / 20 > sum(rewards[:20]) / 20 + 0.3


def test_mtp_modules_learn_and_leave_the_model_below_them_alone(config, tmp_path, base):
    """Without advantages and without a reference, nothing but MTP has anything to learn."""
    settings = config(kl_weight=0.0, steps=2)
    with mock.patch.object(stage, "group_advantages", lambda reward_NG, **_: torch.zeros_like(reward_NG)):
        api.train(settings, tmp_path)
    before = load(tmp_path / "checkpoints" / "base" / "step-0").tensors["model"]
    after = load(tmp_path / "checkpoints" / "rl" / "step-2").tensors["model"]
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("mtp.") for name in moved)


def test_an_answer_that_is_not_ended_is_worth_nothing(config, tmp_path):
    """Every answer is as long as may be, and the reward would be 1."""
    settings = config(steps=1)
    with (
        mock.patch.object(Asking, "sample", _endless(Asking.sample)),
        mock.patch("benthic.posttrain.judge.Judge.judge", side_effect=AssertionError("asked")),
    ):
        api.train(settings, tmp_path)
    first = next(row for row in read_metrics(tmp_path / "metrics.jsonl", "rl") if "reward" in row)
    assert first["reward"] == 0
    assert first["unfinished"] == 16
    assert first["groups_without_variance"] == 4


def _endless(sample):
    def endless(self, *arguments):
        answers = sample(self, *arguments)
        return answers._replace(finished_N=torch.zeros_like(answers.finished_N))

    return endless
