"""A user's mistake: exit status 2, one line on standard error that names it, and nothing half written."""

import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

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


@pytest.mark.parametrize("command", [
    ("chat", "RUN"), ("generate", "RUN", "--prompt", "x"), ("eval", "RUN"), ("export", "RUN", "--out", "OUT"),
    ("train", "tiny", "--out", "RUN"), ("bench", "train", "--set", "model.preset=tiny", "--set",
    "train.sequence_length=64"), ("bench", "prefill", "--set", "model.preset=tiny"),
    ("bench", "decode", "--set", "model.preset=tiny"),
])  # fmt: skip
def test_a_model_that_exceeds_the_memory(benthic, small_run, tmp_path, monkeypatch, command):
    monkeypatch.setattr("benthic.plan.memory._memory_bytes", lambda: 2**20)
    paths = {"RUN": small_run, "OUT": tmp_path / "out"}
    refused(benthic(*(paths.get(part, part) for part in command)), "B parameters", "this machine has 0 GiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_cache_that_exceeds_the_memory(benthic, kind):
    done = benthic("bench", kind, "--batch", 10**9, "--set", "model.preset=tiny")
    refused(done, "GiB of cache takes at least", "this machine has")


def test_a_checkpoint_that_exceeds_the_memory(benthic, small_run, tmp_path, monkeypatch):
    run = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(run / "model")
    monkeypatch.setattr("benthic.plan.memory._memory_bytes", lambda: 2**20)
    refused(benthic("generate", run, "--prompt", "x"), "model: loading")


def test_a_disk_without_room_for_the_weights(benthic, small_run, tmp_path, monkeypatch):
    assert benthic("export", small_run, "--out", tmp_path / "hf").returncode == 0
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("benthic.convert.shards.shutil.disk_usage", lambda path: full)
    for command in (("import", tmp_path / "hf"), ("export", small_run)):
        done = benthic(*command, "--out", tmp_path / "out")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "weights of 0.0 GB, but the disk has 0.0 GB free" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_memory_that_runs_out(benthic, monkeypatch, error):
    monkeypatch.setattr("benthic.lab.bench_inference.build_model", mock.Mock(side_effect=error))
    done = benthic("bench", "decode", "--set", "model.preset=tiny")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "out of memory" in done.stderr


@pytest.mark.parametrize("part", [".", "model"])
def test_eval_of_what_has_no_data(benthic, small_run, tmp_path, part):
    run = shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(run / "data")
    refused(benthic("eval", run / part), f"{run / part}: holds no data/ to be measured on")


def test_import_of_what_is_no_model(benthic, small_run, corpus, tmp_path):
    refused(benthic("import", small_run, "--out", tmp_path / "out"), small_run, "is a run already")
    refused(benthic("import", corpus, "--out", tmp_path / "out"), corpus, "holds no config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("run", "tiny"), ("data", "tiny"), ("train", "tiny"), ("export", "run")])
def test_an_empty_directory_name(benthic, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    refused(benthic(*command, "--out", ""), "'--out': must not be empty")
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
    ("bench", "prefill", "--context", "0"),
    ("bench", "decode", "--context", "-1"),
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


@pytest.mark.parametrize("library", ["fastapi", "starlette", "uvicorn", "prometheus_client"])
def test_serving_without_its_libraries(tmp_path, library):
    program = f"import sys; sys.modules['{library}'] = None; from benthic.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'benthic[serve]'" in done.stderr


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


@pytest.mark.parametrize("below", [(), ("a", "b")])
@pytest.mark.parametrize("command", [("run", "tiny"), ("data", "tiny"), ("train", "tiny"), ("export", "run"),
                                     ("import", "hf")])  # fmt: skip
def test_out_that_is_a_file(benthic, tmp_path, command, below):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(benthic(*command, "--out", file.joinpath(*below)), f"'--out': {file} is a file; give a directory")
    assert file.read_text() == "mine"


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


def test_an_export_is_no_place_for_data_or_training(benthic, small_run, corpus, tmp_path):
    exported = tmp_path / "exported"
    assert benthic("export", small_run, "--out", exported).returncode == 0
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    refused(benthic("data", corpus, "--out", exported), exported, "is a model's directory")
    refused(benthic("run", "tiny", "--out", exported), exported, "is a model's directory")
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before
    shutil.copytree(small_run / "data", exported / "data")
    shutil.copytree(small_run / "tokenizer", exported / "tokenizer")
    refused(benthic("train", "tiny", "--out", exported), exported, "is a model's directory")


def test_a_damaged_shard_is_repaired_by_what_the_message_says(benthic, small_run, corpus, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")

    def files():  # the ledger tells the time that every attempt has taken
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "ledger.json"}

    before = files()
    shard = run / "data" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"xx")
    refused(benthic("run", run / "config.toml", "--out", run), shard, "give `benthic data` the same recipe")
    done = benthic("data", run / "config.toml", "--out", run)
    assert done.returncode == 0
    assert f"note: repaired: {shard}" in done.stderr
    assert files() == before
    assert benthic("run", run / "config.toml", "--out", run).returncode == 0


def test_what_was_left_out_of_a_corpus_is_pointed_to(benthic, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n{"text": "\xff"}\n')
    done = benthic("data", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["rejected"] == 1
    rejected, held_out = done.stderr.splitlines()
    assert rejected == f"note: rejected: 1, first {tmp_path / 'a.jsonl'} at byte 42: invalid UTF-8"
    assert held_out.startswith("note: 50% of the text is held out")


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
    before = json.loads((run / "ledger.json").read_text())["stages"]["pretrain"]
    done = benthic("run", run / "config.toml", "--out", run, "--set", "train.seed=5")
    refused(done, "train.seed")
    assert json.loads((run / "ledger.json").read_text())["stages"]["pretrain"] == before


def test_wrong_sampling(benthic, small_run):
    refused(benthic("generate", small_run, "--prompt", "x", "--set", "inference.temperature=9"), "temperature = 9")
    refused(benthic("generate", small_run, "--prompt", ""), "prompt")


@pytest.mark.parametrize("command", ["sft", "rl", "reward"])
def test_what_one_process_does_is_refused_to_several(benthic, small_run, tmp_path, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = benthic(command, small_run / "config.toml", "--from", small_run, "--out", tmp_path / "out")
    refused(done, "2 processes were started")
    assert not (tmp_path / "out").exists()
