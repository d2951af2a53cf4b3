"""`benthic sft`, and `benthic run` of a recipe with fine-tuning, from the command line."""

import json

import pytest

from benthic.config.load import load_run_config
from benthic.train.checkpoint import committed

RECIPE = """
[model]
preset = "tiny"
num_hidden_layers = 2

[data]
sources = ["{chats}"]
validation_fraction = 0.2

[train]
steps = 2
batch_size = 2
sequence_length = 32

[precision]
compute = "fp32"

[posttrain.sft]
steps = 2
batch_size = 2
learning_rate = 1e-3
"""


@pytest.fixture
def recipe(tmp_path):
    chats = tmp_path / "chats.jsonl"
    said = [{"messages": [{"role": "user", "content": f"how deep {n}?"}, {"role": "assistant", "content": "deep"}]}
            for n in range(30)]  # fmt: skip
    chats.write_text("\n".join(["{", *map(json.dumps, said)]))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(chats=chats))
    return path


@pytest.fixture(autouse=True)
def made_up_peak(monkeypatch):
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda *of: 100.0)


def test_a_run_goes_through_every_stage_and_another_begins_with_it(benthic, recipe, tmp_path):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    done = benthic("run", recipe, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "bits per byte of held-out answers; to talk to it: benthic chat" in done.stdout
    assert "note: rejected: 1" in done.stderr
    assert [path.name for path in committed(run / "checkpoints" / "sft")] == ["step-2"]
    recipe.write_text(recipe.read_text().replace('preset = "tiny"', 'preset = "nano"'))  # not the model's any more
    for _ in range(2):  # the second time there is nothing left to do
        done = benthic("sft", recipe, "--out", tuned, "--from", run, "--set", "posttrain.sft.steps=3")
        assert done.returncode == 0, done.stderr
    config = load_run_config(tuned / "config.toml")
    assert (config.posttrain.base, config.posttrain.sft.steps) == (str(run), 3)
    assert config.model == load_run_config(run / "config.toml").model
    assert [path.name for path in committed(tuned / "checkpoints" / "sft")] == ["step-3"]
    done = benthic("train", recipe, "--out", run)
    assert done.returncode == 2
    assert "checkpoints/sft/step-2: is of a stage that is not asked for" in done.stderr
    assert benthic("generate", tuned, "--prompt", "how", "--set", "inference.max_new_tokens=2").returncode == 0


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--set", "model.hidden_size=32"], "--set model.hidden_size: the model is that of"),
    (["--set", "posttrain.sft.stps=3"], "posttrain.sft.stps"),
    (["--set", "posttrain.sft.steps=0"], "posttrain.sft.steps"),
    (["--set", "posttrain.sft.final_learning_rate=1"], "final_learning_rate=1 must be at most learning_rate=0.001"),
    (["--set", "posttrain.sft.sequence_length=30000"], "posttrain.sft.sequence_length=30000 must be at most"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    benthic, recipe, tmp_path, served_model, arguments, complaint
):
    out = tmp_path / "out"
    done = benthic("sft", recipe, "--out", out, "--from", served_model, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_recipe_without_the_section_is_refused(benthic, tmp_path, served_model):
    done = benthic("sft", "tiny", "--out", tmp_path / "out", "--from", served_model)
    assert done.returncode == 2
    assert "tiny.toml: has no [posttrain.sft]" in done.stderr
    done = benthic("sft", "tiny", "--out", served_model, "--from", served_model)
    assert (done.returncode, "is --out" in done.stderr) == (2, True)
