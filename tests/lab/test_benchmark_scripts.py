"""The scripts of ``benchmarks/``: what they choose and judge by, that each runs, and what it says to a mistake."""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from serving import make_model
from teachers import FakeTeacher, answer

from benthic.lab import compare
from benthic.lab.compare import Outcome, Variant
from benthic.ops import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDIES = ("dense", "balance", "optimizers", "fp8_loss")
TINY = """
[model]
preset = "tiny"
[data]
sources = ["{texts}"]
[train]
minutes = 1
batch_size = 2
sequence_length = 16
validation_tokens = 64
[precision]
compute = "fp32"
"""


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script as a user does, in this process; returns its exit status."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("benthic.plan.machine.measure_gemm_gflops", lambda *_: 100.0)
    ours = {path.stem for path in BENCHMARKS.glob("*.py")}

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        finally:
            for module in ours & sys.modules.keys():
                del sys.modules[module]
        return 0

    return run


def test_a_student_learns_from_a_teacher_and_is_measured_on_answers_it_has_not_seen(run_script, tmp_path, capsys):
    student = make_model(tmp_path / "student")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": f"say {number}"}) + "\n" for number in range(40)))
    teacher = FakeTeacher(lambda body, number: answer("I am well. Thank you " * 3))
    try:
        arguments = (student, "--out", out, "--teacher", teacher.url, "--prompts", prompts, "--count", 30, "--json")
        assert run_script("distillation", *arguments) == 0
    finally:
        teacher.close()
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 30
    assert found["before"]["n"] == found["after"]["n"] == 6
    assert found["after"]["ci95"][1] < found["before"]["ci95"][0]
    assert found["gain"] == pytest.approx(1 - found["after"]["value"] / found["before"]["value"])
    assert 0 < found["gain_ci95"][0] <= found["gain"] <= found["gain_ci95"][1]
    learnt = [json.loads(line)["messages"][0]["content"] for line in (out / "learnt.jsonl").read_text().splitlines()]
    held_out = [
        json.loads(line)["messages"][0]["content"] for line in (out / "held-out.jsonl").read_text().splitlines()
    ]
    assert len(learnt) == 24
    assert not set(learnt) & set(held_out)


def with_loads(loads):
    return Outcome([{"step": 1, "loss": 1.0, "expert_load_max_over_mean": load} for load in loads], 2.0)


def test_load_is_judged_after_warm_up_by_the_worst_window_of_a_layer():
    balance = script("balance")
    early = [[9.0, 9.0]] * 20
    calm, uneven = [[1.0, 1.2]] * 100, [[1.0, 1.2]] * 25 + [[1.0, 1.8]] * 50 + [[1.0, 1.2]] * 5
    found = balance.load(with_loads(early + calm + uneven))
    # 180 steps: 50 calm, 50 calm, 25 calm and 25 uneven, and 30 left over.
    assert found["worst_window"] == pytest.approx(1.5)
    assert found["mean"] == pytest.approx((180 * 1.0 + 130 * 1.2 + 50 * 1.8) / 360)
    assert found["percentile_99"] == pytest.approx(1.8)
    late = balance.load(with_loads(early + [[1.0]] * 100 + [[1.0, 1.6]] * 80))
    assert late["worst_window"] == pytest.approx(1.6)
    assert late["mean"] == pytest.approx((180 * 1.0 + 80 * 1.6) / 260)


def test_a_late_layers_warm_up_is_told_apart():
    balance = script("balance")
    found = balance.load(with_loads([[1.0]] * 120 + [[1.0, 3.0]] * 20 + [[1.0, 1.4]] * 60))
    assert found["worst_window"] == pytest.approx(1.4)
    assert found["worst_with_late_warm_up"] == pytest.approx((20 * 3.0 + 30 * 1.4) / 50)
    brief = balance.load(with_loads([[1.0]] * 190 + [[1.0, 3.0]] * 10))
    assert brief["worst_window"] == pytest.approx(1.0)


def test_the_weight_is_the_best_of_those_that_balance():
    balance = script("balance")
    trials = {"small": (1.9, 2.0), "middle": (1.2, 2.2), "large": (1.1, 2.3), "huge": (1.0, 2.1)}
    assert balance.chosen(trials, 1.3) == "huge"
    assert balance.chosen({key: trials[key] for key in ("small", "middle", "large")}, 1.3) == "middle"
    assert balance.chosen({key: trials[key] for key in ("small", "middle")}, 1.1) == "middle"


def test_equal_time_is_steps_by_what_a_step_takes():
    dense = script("dense")

    class Timed:
        def step_seconds(self, variants):
            return {"recipe": 0.5, "dense": 0.2}

    def steps(minutes, count):
        variants = dense.at_equal_time(Timed(), [Variant("recipe"), Variant("dense")], minutes, count)
        return [variant.settings for variant in variants]

    assert steps(1, None) == [
        ("train.steps=120", "train.validate_every=7"),
        ("train.steps=300", "train.validate_every=18"),
    ]
    assert steps(1, 4) == [("train.steps=4", "train.validate_every=1"), ("train.steps=10", "train.validate_every=1")]


@pytest.fixture
def study_directory(tmp_path, texts, prepared, monkeypatch):
    """For a study of a tiny recipe in place of the quickstart, on data that is there already."""
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda *of: 100.0)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY.format(texts=texts))
    real = compare.load_run_config
    monkeypatch.setattr(compare, "load_run_config", lambda _, settings: real(str(recipe), settings))
    directory = tmp_path / "study"
    directory.mkdir()
    for part in ("data", "tokenizer"):
        (directory / part).symlink_to(prepared / part)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sides"),
    [
        ("dense", ["--steps", "3"], {"recipe", "dense"}),
        ("balance", ["--steps", "4", "--tune-steps", "2"], {"bias", "batch-loss"}),
        ("optimizers", ["--steps", "3", "--tune-steps", "1"], {"muon", "adamw", "adamw, equal time"}),
        ("fp8_loss", ["--steps", "3"], {"fp32", "fp8"}),
    ],
)
def test_studies_run(study_directory, monkeypatch, run_script, name, options, sides):
    pytest.importorskip("matplotlib")
    assert run_script(name, study_directory, "--seeds", "2", *options) == 0
    written = study_directory / f"{name.removesuffix('_loss')}.json"
    figures = json.loads(written.read_text())
    assert set(figures) == sides
    for side in figures.values():
        assert len(side["bits_per_byte"]["values"]) == 2
        assert side["bits_per_byte"]["deviation"] > 0
        assert side["processor_seconds"]["mean"] > 0
    if name == "fp8_loss":
        check_costs(figures)
    else:
        drawn = written.with_suffix(".svg").read_text()
        assert all(f">{side}<" in drawn for side in sides)
    monkeypatch.setattr(compare, "train", lambda *args: pytest.fail("trained again"))
    assert run_script(name, study_directory, "--seeds", "2", *options) == 0


def check_costs(figures):
    """What fp8.json says of FP8 beside fp32."""
    fp8, fp32 = (figures[side]["bits_per_byte"]["values"] for side in ("fp8", "fp32"))
    ratios = [ours / exact for ours, exact in zip(fp8, fp32, strict=True)]
    assert figures["fp8"]["over_fp32"]["validation"]["values"] == [pytest.approx(ratio - 1) for ratio in ratios]
    assert all(0 < abs(cost) < 0.1 for cost in figures["fp8"]["over_fp32"]["training"]["values"])


def test_the_cost_of_fp8_is_relative_and_over_windows():
    fp8_loss = script("fp8_loss")

    def run(losses, bits):
        return Outcome([{"step": 1, "loss": loss} for loss in losses], bits)

    exact, rounded = [4.0, 2.0] * 50, [4.4, 2.2] * 25 + [4.0, 2.6] * 25
    cost = fp8_loss.cost(run(rounded, 2.1), run(exact, 2.0))
    assert cost == pytest.approx((0.1, 0.1, 0.05))
    assert str(cost) == "training loss +10.000%, at the end +10.000%; validation +5.000%"


def test_gains_are_of_each_seed_and_intervals_are_apart_where_all_are():
    def row(value, low, high):
        return {"accuracy": {"sums": {"value": value, "n": 500, "ci95": [low, high]}}}

    runs = [[row(0.2, 0.1, 0.3), {"loss": 1.0}, row(0.9, 0.8, 0.95), row(0.5, 0.4, 0.6)],
            [row(0.25, 0.15, 0.35), row(0.65, 0.45, 0.75)]]  # fmt: skip
    found = script("grpo").accuracies(runs, "accuracy")["sums"]
    assert found["gain"]["values"] == pytest.approx([0.3, 0.4])
    assert found["apart"]
    runs[1][0] = row(0.25, 0.15, 0.41)
    assert not script("grpo").accuracies(runs, "accuracy")["sums"]["apart"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("recompute", ["tiny", "train.steps=2"], ["kept", "recomputed", "s a step in fp32"]),
        ("scaling", ["layers", "tiny", "train.steps=2"], ["3 layers", "6 layers", "twice the layers"]),
        ("scaling", ["experts", "tiny", "train.steps=2"], ["16 experts", "64 experts", "time of a step"]),
        ("checkpoint_cost", ["tiny", "precision.compute=fp32"], ["a step in fp32", "every 100 steps"]),
        ("train_vs_transformers", ["tiny", "precision.compute=bf16"], ["in bf16", "times eager"]),
        ("memory_vs_transformers", ["tiny"], ["recomputing", "of transformers'"]),
        ("train_vs_blas", ["tiny", "--pairs", "1"], ["our own", "by the BLAS", "1 pairs"]),
        ("train_vs_blas", ["tiny", "--bf16", "--pairs", "1"], ["our own", "by the BLAS", "1 pairs"]),
        ("products_vs_blas", ["--rounds", "1"], ["2,048 x 2,048 x 2,048", "bf16", "fp32"]),
        ("prefill_vs_blas", ["tiny", "--context", "9", "--pairs", "1"], ["our own", "by the BLAS", "1 pairs"]),
        ("pairs", ["train.steps=1", "--ms", "1"], ["one after the other", "in turns", "of the time"]),
        ("rollouts", ["tiny", "--tokens", "3"], ["64 at once", "one at a time", "ratio"]),
    ],
)
def test_benchmarks_run(run_script, monkeypatch, capfd, name, arguments, said):
    if "transformers" in name:
        pytest.importorskip("transformers")
    own = native.has_fast_vectors() or (name != "products_vs_blas" and native.has_tiles())
    if "blas" in name and not own:
        pytest.skip("the BLAS is the faster here")
    monkeypatch.setenv("BENTHIC_NATIVE", os.environ.get("BENTHIC_NATIVE", "1"))  # which some of them change
    assert run_script(name, *arguments) == 0
    printed = capfd.readouterr().out
    for part in said:
        assert part in printed


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        *((name, ["nosuch"], "recipe 'nosuch'") for name in ("recompute", "checkpoint_cost", "train_vs_blas")),
        ("scaling", ["experts", "bench", "model.n_expert=3"], "model.n_expert"),
        ("memory_vs_transformers", ["bench", "precision.compute=fp8"], "precision.compute=fp8: not compared"),
        ("train_vs_transformers", ["bench", "train.optimizer.name=muon"], "train.optimizer.name=muon: not compared"),
        ("train_vs_transformers", ["bench", "train.micro_batch_size=2"], "train.micro_batch_size=2: not compared"),
        *((name, ["DIR", "--set", "train.stepz=1"], "train.stepz") for name in STUDIES),
        ("context_length", ["DIR"], "config.toml"),
        ("grpo", ["DIR", "--run", "DIR"], "config.toml"),
        ("rollouts", ["nosuch"], "preset or recipe 'nosuch'"),
        ("expert_placement", ["DIR", "--gpus", "8"], "DIR"),
    ],
)
def test_a_mistake_is_one_line(run_script, tmp_path, capsys, name, arguments, said):
    arguments = [str(tmp_path) if argument == "DIR" else argument for argument in arguments]
    assert run_script(name, *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert said.replace("DIR", str(tmp_path)) in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("decode_vs_llamacpp", ["nosuch"], "invalid choice: 'nosuch'"),
        ("decode_vs_llamacpp", ["--precisions", "fp32,fp8"], "fp8: no such precision in GGUF"),
        ("decode_vs_llamacpp", ["--decode", "x"], "x: must be a number of tokens, at least 0"),
        ("decode_vs_llamacpp", ["--prefill", "0"], "0: must be a number of tokens, at least 1"),
        ("scaling", ["width"], "invalid choice: 'width'"),
        ("balance", ["DIR", "--seeds", "0"], "0: must be a whole number from 1"),
        ("dense", ["DIR", "--minutes", "-3"], "-3: must be more than 0"),
    ],
)
def test_a_wrong_option_is_told(run_script, capsys, name, arguments, said):
    assert run_script(name, *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("context", [0, 5])
def test_llama_cpp_decodes_at_the_context_asked_for(monkeypatch, context):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    done = []

    class Llama:
        held = 0

        def forget(self, keep=0):
            self.held = min(self.held, keep)

        def read(self, ids):
            assert ids
            done.append((self.held, len(ids)))
            self.held += len(ids)

    run = script("decode_vs_llamacpp").llama_work(Llama(), "decode", context, 100)
    for _ in range(2):
        done.clear()
        assert run() == 16
        assert done == [(context + number, 1) for number in range(16)]
