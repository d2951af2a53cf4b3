"""The scripts of docs/experiments.md: what they choose and judge by, and that each runs from end to end."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benthic.lab import compare
from benthic.lab.compare import Outcome, Variant

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sides"),
    [
        ("dense", ["--steps", "3"], {"recipe", "dense"}),
        ("balance", ["--steps", "4", "--tune-steps", "2"], {"bias", "batch-loss"}),
        ("optimizers", ["--steps", "3", "--tune-steps", "1"], {"muon", "adamw", "adamw, equal time"}),
    ],
)
def test_scripts_run(tmp_path, texts, prepared, monkeypatch, name, options, sides):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda dtype: 100.0)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY.format(texts=texts))
    real = compare.load_run_config
    monkeypatch.setattr(compare, "load_run_config", lambda _, settings: real(str(recipe), settings))
    directory = tmp_path / "study"
    directory.mkdir()
    for part in ("data", "tokenizer"):
        (directory / part).symlink_to(prepared / part)
    monkeypatch.setattr(sys, "argv", [name, str(directory), "--seeds", "2", *options])
    script(name).main()
    figures = json.loads((directory / f"{name}.json").read_text())
    assert set(figures) == sides
    for side in figures.values():
        assert len(side["bits_per_byte"]["values"]) == 2
        assert side["bits_per_byte"]["deviation"] > 0
    drawn = (directory / f"{name}.svg").read_text()
    assert all(f">{side}<" in drawn for side in sides)
    monkeypatch.setattr(compare, "train", lambda *args: pytest.fail("trained again"))
    script(name).main()
