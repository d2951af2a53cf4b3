"""A whole run: its stages in order, resumed, left out, and failing one at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benthic.errors import InputError
from benthic.evaluate.records import EvaluationRecord
from benthic.run import measures, whole
from benthic.run.evaluation import evaluate_run, remaining
from benthic.train.checkpoint import load
from benthic.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def run(whole_run, tmp_path):
    """A finished one, to be changed."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def content(run: Path, *names: str) -> dict[str, bytes]:
    paths = [path for name in names for path in sorted((run / name).rglob("*"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.is_file()}


def again(config, out, skip=()):
    return whole.run(whole.plan(config, out, skip), out)


def test_the_stages_in_order_with_what_they_leave(whole_run, whole_config):
    names = ("data", "pretrain", "extend-1", "sft", "rl", "evaluation", "export", "report")
    assert whole.plan(whole_config(), whole_run).names == names
    assert set(json.loads((whole_run / "ledger.json").read_text())["stages"]) == set(names)
    there = {path.name for path in whole_run.iterdir()}
    assert there >= {"data", "sft", "problems", "checkpoints", "evaluation", "model", "report.html"}
    page = (whole_run / "report.html").read_text()
    for text in ("extend-1", "answers-chats", "letters", "hello"):
        assert text in page
    assert "answers-chats" in (whole_run / "model" / "README.md").read_text()


def test_a_finished_run_again_changes_nothing(run, whole_config, capsys):
    before = content(run, "checkpoints", "evaluation", "data", "sft", "problems", "metrics.jsonl")
    weights = content(run, "model").keys()
    outcome = again(whole_config(), run)
    assert not outcome.failed
    assert [record.stage for record in outcome.records] == ["pretrain", "extend-1", "sft", "rl"]
    assert content(run, "checkpoints", "evaluation", "data", "sft", "problems", "metrics.jsonl") == before
    assert content(run, "model").keys() == weights
    assert "8/8 report" in capsys.readouterr().err


def test_what_was_left_out_is_made_up_for(whole_run, whole_config, tmp_path):
    """The outcome is that of a run that left nothing out."""
    out = tmp_path / "out"
    first = again(whole_config(), out, ["rl", "evaluation", "report"])
    assert not first.failed
    assert not (out / "evaluation").exists()
    assert not (out / "checkpoints" / "rl").exists()
    exported = content(out, "model")["model/model-00001-of-00001.safetensors"]
    again(whole_config(), out)
    assert content(out, "model")["model/model-00001-of-00001.safetensors"] != exported
    names = sorted(path.name for path in (out / "evaluation").iterdir())
    assert names == ["extend-1.json", "pretrain.json", "rl.json", "sft.json"]
    for name in names:
        ours, theirs = (EvaluationRecord.load(one / "evaluation" / name) for one in (out, whole_run))
        clock = {"when": "", "seconds": 0.0}
        assert ours.model_copy(update=clock) == theirs.model_copy(update=clock)
    assert load(out / "checkpoints" / "rl" / "step-3").state == load(whole_run / "checkpoints" / "rl" / "step-3").state


def test_extension_left_out_for_good(whole_config, tmp_path):
    out = tmp_path / "out"
    skip = ["extend", "rl", "evaluation", "export", "report"]
    again(whole_config(), out, skip)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"pretrain", "sft"}
    assert "max_position_embeddings = 256" in (out / "config.toml").read_text()
    with pytest.raises(InputError, match=r"extend-1.*|train\.extend"):
        again(whole_config(), out)


@pytest.mark.parametrize(
    ("skip", "told"),
    [
        (["nonsense"], "--skip nonsense: no such stage; allowed are data, pretrain, extend, sft, rl, evaluation"),
        (["pretrain"], "--skip pretrain: all else begins with it"),
    ],
)
def test_what_cannot_be_left_out(whole_config, tmp_path, skip, told):
    with pytest.raises(InputError, match=told) as refused:
        whole.plan(whole_config(), tmp_path / "out", skip)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_stage_that_has_begun_is_not_left_out_but_a_finished_one_is_kept(run, whole_config):
    plan = whole.plan(whole_config(), run, ["pretrain", "sft", "rl"])
    assert plan.names[:5] == ("data", "pretrain", "extend-1", "sft", "rl")
    (run / "checkpoints" / "rl" / "step-3").rename(run / "checkpoints" / "rl" / "step-1")
    with pytest.raises(InputError, match=r"--skip rl: .* has begun it already"):
        whole.plan(whole_config(), run, ["rl"])


def test_a_stage_cannot_be_put_in_before_one_that_has_begun(run, whole_config):
    shutil.rmtree(run / "checkpoints" / "sft")
    with pytest.raises(InputError, match="rl was begun without sft, which the recipe has; give --skip sft"):
        whole.plan(whole_config(), run)
    assert "sft" not in whole.plan(whole_config(), run, ["sft"]).names


# ---------------------------------------------------------------------- failures


def broken(monkeypatch, name):
    """A measure that fails, whatever is measured."""

    def fail(subject, report):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measures, name, fail)


def test_a_measure_that_fails_is_one_line_and_is_tried_again(run, whole_config, monkeypatch, capsys):
    (run / "evaluation" / "sft.json").unlink()
    with monkeypatch.context() as patched:
        broken(patched, "_acceptance")
        outcome = again(whole_config(), run)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == [
        "error: evaluation: acceptance of sft: [Errno 28] No space left on device",
        "error: evaluation: 1 of its measures failed",
    ]
    assert outcome.failed == ["evaluation: 1 of its measures failed"]
    record = EvaluationRecord.load(run / "evaluation" / "sft.json")
    assert record.not_measured["acceptance"] == "[Errno 28] No space left on device"
    assert {"validation", "letters", "choice"} <= record.scores.keys()
    assert record.samples
    others = content(run, "evaluation")
    assert not again(whole_config(), run).failed
    after = content(run, "evaluation")
    assert {name for name in after if after[name] != others[name]} == {"evaluation/sft.json"}
    repaired = EvaluationRecord.load(run / "evaluation" / "sft.json")
    assert list(repaired.not_measured) == ["retrieval-32"]
    assert repaired.scores == record.scores
    assert len(repaired.acceptance) == 2


def test_an_export_that_fails_leaves_the_rest_to_be_done(run, whole_config, monkeypatch, capsys):
    (run / "report.html").unlink()

    def fail(out):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(whole, "export_trained", fail)
        outcome = again(whole_config(), run)
    assert outcome.failed == ["export: [Errno 28] No space left on device"]
    assert (run / "report.html").is_file()
    assert "error: export: [Errno 28]" in capsys.readouterr().err


def test_a_damaged_record_and_another_question_are_measured_anew(run, whole_config, sources):
    config = whole_config()
    resolved = whole.load_run_config(run / "config.toml")
    (run / "evaluation" / "rl.json").write_text("{")
    assert remaining(run, resolved) == 1
    other = {**config.evaluation.model_dump(), "prompts": ("something else",)}
    asked = resolved.model_copy(update={"evaluation": type(config.evaluation).model_validate(other)})
    assert remaining(run, asked) == 4
    passed = []
    assert evaluate_run(run, asked, passed=lambda *of: passed.append(of)) == 0
    assert passed == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert remaining(run, asked) == 0
    assert EvaluationRecord.load(run / "evaluation" / "rl.json").samples[-1].prompt == "something else"


def test_a_missing_task_file_fails_the_evaluation_and_nothing_else(run, whole_config, sources, tmp_path):
    evaluation = {**whole_config().evaluation.model_dump(), "tasks": (str(tmp_path / "gone.jsonl"),)}
    outcome = again(whole_config(evaluation=evaluation), run)
    assert outcome.failed == [
        f"evaluation: {tmp_path / 'gone.jsonl'}: no such file; give a task file, JSON lines"
    ]  # fmt: skip


# ---------------------------------------------------------------------- before anything is done


def test_rows_of_a_dry_run_write_nothing(whole_config, tmp_path):
    out = tmp_path / "out"
    rows = whole.rows(whole.plan(whole_config(), out, ["report"]), out)
    assert [row.name for row in rows] == ["data", "pretrain", "extend-1", "sft", "rl", "evaluation", "export"]
    assert {row.forecast.how for row in rows[1:5]} == {"measured"}
    assert all(row.forecast.seconds is not None and row.forecast.seconds >= 0 for row in rows)
    assert not out.exists()


def test_rows_of_a_run_that_has_begun(run, whole_config):
    shutil.rmtree(run / "checkpoints" / "rl")
    (run / "checkpoints" / "sft" / "step-3").rename(run / "checkpoints" / "sft" / "step-1")
    before = content(run, ".")
    states = {row.name: row.state for row in whole.rows(whole.plan(whole_config(), run), run)}
    assert (states["data"], states["pretrain"], states["extend-1"]) == ("done", "done", "done")
    assert (states["sft"], states["rl"]) == ("goes on after step-2", "")
    assert content(run, ".") == before


def test_rows_of_a_run_that_has_ended(run, whole_config):
    def states():
        return {row.name: row.state for row in whole.rows(whole.plan(whole_config(), run), run)}

    assert states()["evaluation"] == "done"
    shutil.rmtree(run / "evaluation")
    assert states()["evaluation"] == ""


def test_a_model_that_is_larger_than_this_machine_is_planned_by_arithmetic(tmp_path):
    config = whole.load_run_config("v3-671b", ['data.sources=["stdlib"]'])
    found = whole.forecasts(config, tmp_path / "out", measure=True)
    assert {one.how for one in found.values()} == {"by arithmetic"}
    # 14.8T tokens of 250 GFLOP each, at the rate of this machine, and MTP on top
    pretrain = found["pretrain"]
    assert pretrain.devices == config.parallel.processes
    assert pretrain.seconds * pretrain.devices == pytest.approx(14.8e12 * 250e9 / 60e9, rel=0.1)


def test_minutes_are_as_given_and_epochs_not_known(whole_config, tmp_path):
    config = whole_config()
    train = config.train.model_copy(update={"minutes": 3.0, "steps": None})
    sft = config.posttrain.sft.model_copy(update={"steps": None, "epochs": 2})
    posttrain = config.posttrain.model_copy(update={"sft": sft})
    found = whole.forecasts(config.model_copy(update={"train": train, "posttrain": posttrain}), tmp_path / "out")
    assert found["pretrain"].how == "as given"
    assert found["pretrain"].seconds == pytest.approx(180, rel=0.2)
    assert (found["sft"].seconds, found["sft"].how) == (None, "not known before the data is there")


def test_devices_share_pretraining_and_are_all_paid_for(whole_config, tmp_path):
    config = whole_config()
    parallel = config.parallel.model_copy(update={"replicate": 4})
    alone, four = (whole.forecasts(one, tmp_path) for one in (config, config.model_copy(update={"parallel": parallel})))
    assert four["pretrain"].seconds == pytest.approx(alone["pretrain"].seconds / 4)
    assert four["pretrain"].cost(2.0) == pytest.approx(alone["pretrain"].cost(2.0))
    assert four["sft"].seconds == alone["sft"].seconds


# ---------------------------------------------------------------------- several processes


def torchrun(recipe, out, *further):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benthic", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(recipe), "--out", str(out), *further], check=False, capture_output=True, text=True, timeout=500,
        env=environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_recipe_under_torchrun(recipe, whole_run, tmp_path):
    """Two processes pretrain, one does the rest; the losses are those of one process."""
    out = tmp_path / "out"
    refused = torchrun(recipe, out)
    assert refused.returncode != 0
    assert "2 processes were started" in refused.stderr
    assert not out.exists()
    done = torchrun(recipe, out, "--set", "parallel.replicate=2")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [(row["stage"], row["loss"]) for row in read_metrics(one / "metrics.jsonl") if "loss" in row and row["stage"]
         in ("pretrain", "extend-1", "sft")]
        for one in (out, whole_run)
    )  # fmt: skip
    assert [stage for stage, _ in ours] == [stage for stage, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-4)
    assert len(list((out / "evaluation").iterdir())) == 4
    assert (out / "report.html").is_file()
    before = (out / "metrics.jsonl").read_text()
    again = torchrun(recipe, out, "--set", "parallel.replicate=2")
    assert again.returncode == 0, again.stderr
    assert (out / "metrics.jsonl").read_text() == before
