"""A user's mistake: exit status 2, one line on standard error that names it, and nothing half written."""

import json
import os
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from benthic.lock import locked

MINIMAL = '[model]\npreset = "tiny"\n[train]\nsteps = 2\n'


def refused(done, *said):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    for part in said:
        assert str(part) in done.stderr


@pytest.mark.parametrize("command", [
    ("eval",), ("chat",), ("generate", "--prompt", "x"), ("export", "--out", "out"), ("import", "--out", "out"),
])  # fmt: skip
def test_a_path_that_is_not_there(benthic, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    refused(benthic(command[0], "nowhere", *command[1:]), "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_this_machine(benthic, tmp_path):
    out = tmp_path / "out"
    refused(benthic("run", "v3-671b", "--out", out), "682.6B parameters", "this machine has")
    assert not out.exists()


@pytest.mark.parametrize("command", [("run", "tiny"), ("data", "tiny"), ("train", "tiny"), ("export", "run")])
def test_an_empty_directory_name(benthic, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    refused(benthic(*command, "--out", ""), "--out: must not be empty")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("eval",), ("chat",), ("generate", "--prompt", "x")])
def test_a_file_where_a_run_is_wanted(benthic, tmp_path, command):
    path = tmp_path / "file"
    path.write_text("x")
    refused(benthic(command[0], path, *command[1:]), path)


@pytest.mark.parametrize(("text", "said"), [
    ("[model\n", "line 1"), (MINIMAL + "batch_sise = 4\n", "did you mean 'batch_size'"),
    (MINIMAL + "seed = -1\n", "seed = -1"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["run", "data", "train"])
def test_a_recipe_with_a_mistake(benthic, tmp_path, text, said, command):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    refused(benthic(command, recipe, "--out", tmp_path / "out"), recipe, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [
    ("plan", "v3-671"), ("plan", "tiny", "--set", "model.n_group=3"), ("run", "quikstart", "--out", "out"),
    ("bench", "train", "--set", "train.minutes=1"), ("bench", "train", "--set", "precision.compute=auto"),
    ("bench", "decode", "--context", "0"),
    ("generate", "nowhere", "--prompt", "x", "--set", "train.steps=3"), ("nope",), ("plan",), ("run", "--out"),
    ("plan", "tiny", "--jsn"), ("export", "nowhere", "--format", "gguf2", "--out", "out"),
    ("export", "nowhere", "--precision", "f32", "--out", "out"),
    ("export", "nowhere", "--format", "gguf", "--precision", "q9", "--out", "out"),
    ("export", "nowhere", "--format", "gguf", "--out", "out"),
])  # fmt: skip
def test_wrong_arguments(benthic, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refused(benthic(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_corpus(benthic, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(benthic("data", empty, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(benthic, tmp_path):
    refused(benthic("data", tmp_path / "nowhere.txt", "--out", tmp_path / "out"), "nowhere.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(benthic, tmp_path):
    secret = tmp_path / "secret.toml"
    secret.write_text(MINIMAL)
    secret.chmod(0)
    refused(benthic("run", secret, "--out", tmp_path / "out"), secret, "Permission denied")


def test_a_recipe_that_is_no_text(benthic, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(b"\xff\xfe\x00")
    refused(benthic("run", recipe, "--out", tmp_path / "out"), recipe, "UTF-8")


def test_out_that_is_a_file(benthic, tmp_path, corpus):
    out = tmp_path / "out"
    out.write_text("mine")
    refused(benthic("data", corpus, "--out", out), out)
    assert out.read_text() == "mine"


def test_training_without_data(benthic, tmp_path):
    refused(benthic("train", "tiny", "--out", tmp_path / "out"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_never_replaces_an_imported_model(benthic, small_run, corpus, tmp_path):
    exported, run = tmp_path / "hf", tmp_path / "run"
    assert benthic("export", small_run, "--out", exported).returncode == 0
    assert benthic("import", exported, "--out", run).returncode == 0
    shutil.rmtree(run / "tokenizer")
    for part in ("data", "tokenizer"):
        shutil.copytree(small_run / part, run / part)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(benthic("train", "tiny", "--out", run), run / "model", "already there")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_model_folder_with_something_else_in_it_is_refused_before_training(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / "model" / "notes.txt").write_text("mine")
    refused(benthic("train", run / "config.toml", "--out", run), run / "model")
    shutil.rmtree(run / "model")
    (run / "model").write_text("mine")
    refused(benthic("train", run / "config.toml", "--out", run), run / "model")
    assert (run / "model").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_run_that_another_process_works_on(benthic, small_run, command):
    with locked(small_run):
        refused(benthic(command, small_run / "config.toml", "--out", small_run), small_run, "in use by process")
    assert not (small_run / ".lock").exists()


@pytest.mark.parametrize("setting", ["data.seed=7", 'data.sources=["stdlib"]', "data={seed=7}"])
def test_other_data_than_is_prepared(benthic, small_run, setting):
    done = benthic("train", "tiny", "--out", small_run, "--set", setting)
    refused(done, setting.partition("=")[0], "was prepared with")


def test_sequences_longer_than_the_model_takes(benthic, tmp_path):
    done = benthic("run", "tiny", "--out", tmp_path / "out", "--set", "train.sequence_length=300")
    refused(done, "--set train.sequence_length=300 must be at most model.max_position_embeddings=256")
    assert not (tmp_path / "out").exists()


def test_a_model_with_weights_that_are_not_numbers(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    (weights,) = (run / "model").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    done = benthic("generate", run, "--prompt", "The sea")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "not finite" in done.stderr


def test_a_baseline_of_sources_that_are_gone(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r"sources = \[.*?\]", 'sources = ["gone.txt"]', config, flags=re.DOTALL))
    refused(benthic("eval", run, "--baseline"), "gone.txt")


def test_a_corrupted_checkpoint(benthic, small_run, corpus, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    weights = run / "checkpoints" / "pretrain" / "step-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused(benthic("run", run / "config.toml", "--out", run), weights)


def test_a_truncated_model(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    weights = next((run / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(benthic("generate", run, "--prompt", "x"), weights)


def test_a_damaged_config_of_a_model(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / "model" / "config.json").write_text("{")
    refused(benthic("generate", run, "--prompt", "x"), run / "model" / "config.json")


def test_resuming_with_other_settings(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    before = json.loads((run / "ledger.json").read_text())
    done = benthic("run", run / "config.toml", "--out", run, "--set", "train.seed=5")
    refused(done, "train.seed")
    assert json.loads((run / "ledger.json").read_text()) == before


def test_wrong_sampling(benthic, small_run):
    refused(benthic("generate", small_run, "--prompt", "x", "--set", "inference.temperature=9"), "temperature = 9")
    refused(benthic("generate", small_run, "--prompt", ""), "prompt")
