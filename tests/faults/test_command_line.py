"""Faults of training met by the real command in a real process: its status, its one line, and what it leaves."""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.config.load import dump_toml, load_run_config
from benthic.files import sha256
from benthic.train.checkpoint import committed, load

PROGRAM = [sys.executable, "-c", "from benthic.cli import main; main()"]


def process(*arguments, **options):
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def recipe(tiny_run_config, tmp_path):
    """Writes a recipe; keywords go to ``train``."""

    def write(**train):
        path = tmp_path / "recipe.toml"
        path.write_text(dump_toml(tiny_run_config(**train)))
        return path

    return write


def refused(done, *said, status=2):
    assert done.returncode == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for part in said:
        assert str(part) in errors[0]


def tensors(out):
    return load(committed(out / "checkpoints" / "pretrain")[-1]).tensors


def assert_same_weights(out, whole):
    for group, expected in tensors(whole).items():
        assert all(torch.equal(tensors(out)[group][name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(recipe, make_run, number):
    path, whole, out = recipe(steps=60, checkpoint_every=1000, validate_every=1000), make_run("whole"), make_run()
    with subprocess.Popen([*PROGRAM, "train", path, "--out", out], stderr=subprocess.PIPE, text=True) as child:
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(number)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 128 + number
    (saved,) = committed(out / "checkpoints" / "pretrain")
    step = load(saved).state["step"]
    assert 3 <= step < 60
    assert errors.splitlines()[-1] == f"stopped after step {step} of pretrain, saved in {out}"
    assert not (out / ".lock").exists()
    assert process("train", path, "--out", out).returncode == 0
    assert process("train", path, "--out", whole).returncode == 0
    assert_same_weights(out, whole)


def test_a_disk_that_takes_no_more_ends_the_run_and_the_last_checkpoint_loads(recipe, make_run):
    path, out = recipe(steps=8, checkpoint_every=4, keep_checkpoints=2), make_run()
    assert process("train", path, "--out", out).returncode == 0
    shutil.rmtree(out / "checkpoints" / "pretrain" / "step-8")
    shutil.rmtree(out / "model")
    # Weights fit into this, the optimizer's state does not.
    size = (out / "checkpoints" / "pretrain" / "step-4" / "optimizer.safetensors").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))  # noqa: E731
    done = process("train", path, "--out", out, preexec_fn=limit)
    refused(done, "step-8: not saved", "File too large", "earlier checkpoints are intact", status=1)
    assert [path.name for path in (out / "checkpoints" / "pretrain").iterdir()] == ["step-4"]
    assert process("train", path, "--out", out).returncode == 0


@pytest.fixture(scope="module")
def finished(tiny_run_config, prepared, tmp_path_factory):
    """A small run that tests copy and damage, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.toml").write_text(dump_toml(tiny_run_config(steps=4, checkpoint_every=2)))
    for part in ("data", "tokenizer"):
        shutil.copytree(prepared / part, folder / "run" / part)
    done = process("train", folder / "recipe.toml", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def damaged(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/pretrain/step-4/model.safetensors",
        "checkpoints/pretrain/step-4/optimizer.safetensors",
        "checkpoints/pretrain/step-4/state.json",
        "checkpoints/pretrain/step-4/manifest.json",
        "data/train-00000.bin",
        "data/train-boundaries.bin",
        "data/val-00000.bin",
        "data/manifest.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_named_and_nothing_is_changed(benthic, damaged, name, fault):
    path = damaged / name
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        content[len(content) // 3] ^= 0x10
        path.write_bytes(content)
    elif fault == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    before = contents(damaged)
    done = benthic("train", damaged / "config.toml", "--out", damaged)
    # Of a checkpoint's manifest, what is damaged may be another file's hash.
    refused(done, path.parent if fault == "flipped" or name.startswith("tokenizer") else path)
    assert contents(damaged) == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.num_hidden_layers=3", "model.num_hidden_layers: saved 2, given 3"),
        ("train.batch_size=2", "train.batch_size: saved 4, given 2"),
        ("train.optimizer.learning_rate=0.5", "train.optimizer.learning_rate: saved 0.003, given 0.5"),
        ("precision.compute=bf16", "precision.compute: saved fp32, given bf16"),
        ("data.seed=3", "data.seed"),
        ('data.sources=["stdlib"]', "data.sources"),
    ],
)
def test_other_settings_are_refused_with_the_difference(benthic, damaged, setting, said):
    before = contents(damaged)
    refused(benthic("train", damaged / "config.toml", "--out", damaged, "--set", setting), said)
    assert contents(damaged) == before


@pytest.mark.parametrize("part", ["data", "tokenizer"])
def test_other_data_or_another_tokenizer_is_refused(benthic, damaged, texts, tmp_path, part):
    assert benthic("data", texts, "--out", tmp_path / "other", "--set", "model.vocab_size=300").returncode == 0
    for name in ("data", "tokenizer") if part == "data" else ("tokenizer",):
        shutil.rmtree(damaged / name)
        shutil.copytree(tmp_path / "other" / name, damaged / name)
    said = "corpus.data: saved" if part == "data" else f"{damaged / 'tokenizer'}: not the tokenizer"
    refused(benthic("train", damaged / "config.toml", "--out", damaged), said)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def hostile(run, kind, target):
    """Turns a run's model and newest checkpoint into something that must not be believed."""
    model = next((run / "model").glob("*.safetensors"))
    files = [model, run / "checkpoints" / "pretrain" / "step-4" / "model.safetensors"]
    if kind == "pickle":
        for file in files:
            file.write_bytes(pickle.dumps(Bomb(target)))
    elif kind == "header":
        for file in files:
            file.write_bytes(struct.pack("<Q", 100 * 2**20) + b" " * 64)
            os.truncate(file, 200 * 2**20)
    elif kind == "claim":  # as a zip bomb does: little on disk that claims to be much
        for file in files:
            header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
            file.write_bytes(struct.pack("<Q", len(header)) + header)
    elif kind == "link":
        for file in files:
            file.rename(target.with_name(file.parent.name))
            file.symlink_to(target.with_name(file.parent.name))
    else:
        index = run / "model" / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], f"../../{target.name}")
        index.write_text(json.dumps(content))
        shutil.move(model, target.with_name("outside"))
        manifest = files[1].with_name("manifest.json")
        content = json.loads(manifest.read_text())
        content["files"][f"../{target.name}.safetensors"] = content["files"].pop("model.safetensors")
        manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["pickle", "header", "claim", "link", "path"])
def test_a_hostile_model_or_checkpoint_is_refused_by_every_command(benthic, damaged, tmp_path, kind):
    target = tmp_path / "executed"
    hostile(damaged, kind, target)
    for command in (
        ("generate", damaged, "--prompt", "x"),
        ("chat", damaged),
        ("eval", damaged),
        ("export", damaged, "--out", tmp_path / "out"),
        ("import", damaged / "model", "--out", tmp_path / "out"),
        ("train", damaged / "config.toml", "--out", damaged),
    ):
        refused(benthic(*command), damaged)
    assert not target.exists()
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_do_not_train(benthic, damaged):
    """A checkpoint with NaN in it and right hashes, as a broken machine may have written it."""
    checkpoint = damaged / "checkpoints" / "pretrain" / "step-2"
    shutil.rmtree(damaged / "checkpoints" / "pretrain" / "step-4")
    shutil.rmtree(damaged / "model")
    state = load_file(checkpoint / "model.safetensors")
    state["transformer.norm.weight"][0] = float("nan")
    save_file(state, checkpoint / "model.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / "model.safetensors"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    # Two steps are left, and three in trouble would end the run: it gets to the last validation.
    assert load_run_config(damaged / "config.toml").train.steps == 4
    done = benthic("train", damaged / "config.toml", "--out", damaged)
    refused(done, "step 4: the validation is not finite", status=1)
    assert [path.name for path in committed(checkpoint.parent)] == ["step-2"]
    assert not (damaged / "model").exists()
