"""SIGKILL of a process in the stage of fine-tuning: the resumed run is bit for bit the uninterrupted one."""

import json
import random
import signal
import subprocess
import sys

import pytest
import torch

from benthic.api import KINDS
from benthic.config.load import dump_toml
from benthic.config.schema import RunConfig
from benthic.data.prepare import prepare
from benthic.train.checkpoint import committed, load
from benthic.train.loop import train
from benthic.train.metrics import read_metrics

# A thread kills the process some time after a given step of all stages together has begun.
CHILD = """
import os, signal, sys, threading, time
import torch
import benthic
from benthic.train import loop

number, delay = int(sys.argv[3]), float(sys.argv[4])
torch.set_num_threads(int(sys.argv[5]))
loop.measure_gemm_gflops = lambda *of: 100.0
real_step, taken = loop.train_step, 0

def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def step(*args, **kwargs):
    global taken
    taken += 1
    if taken == number:
        threading.Thread(target=kill, daemon=True).start()
    return real_step(*args, **kwargs)

loop.train_step = step
from benthic.config.load import load_run_config
benthic.train(load_run_config(sys.argv[1]), sys.argv[2])
"""


def check(tiny_run_config, tmp_path, monkeypatch, adapter, kills) -> None:
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda *of: 100.0)
    chats = tmp_path / "chats.jsonl"
    rng = random.Random(0)
    said = [[("user", f"how deep {n}?"), ("assistant", "deep " * rng.randrange(1, 9))] for n in range(60)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in said]
    chats.write_text("\n".join(map(json.dumps, lines)))
    sft = {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "validate_every": 3}
    config = RunConfig.model_validate({
        **tiny_run_config(steps=3, checkpoint_every=2, batch_size=2).model_dump(),
        "data": {"sources": (str(chats),), "validation_fraction": 0.2},
        "posttrain": {"sft": {**sft, "adapter": adapter}},
    })  # fmt: skip
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(config))
    whole, out = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, out):
        prepare(config.data, 320, run)
    train(config, whole, kinds=KINDS)
    for number, delay in kills:
        arguments = map(str, (recipe, out, number, delay, torch.get_num_threads()))
        command = [sys.executable, "-c", CHILD, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, timeout=280)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    train(config, out, kinds=KINDS)
    assert losses(out) == losses(whole)
    for stage in ("pretrain", "sft"):
        left, right = (load(committed(run / "checkpoints" / stage)[-1]) for run in (out, whole))
        assert left.state == right.state
        for group, tensors in right.tensors.items():
            for name, tensor in tensors.items():
                assert torch.equal(left.tensors[group][name], tensor), (stage, group, name)


def losses(out) -> list[tuple[str, int, float]]:
    rows = read_metrics(out / "metrics.jsonl")
    return [
        (row["stage"], row["step"], row.get("loss", row.get("answer_bits_per_byte")))
        for row in rows
        if "loss" in row or "answer_bits_per_byte" in row
    ]


def test_killed_in_the_first_step_and_while_saving(tiny_run_config, tmp_path, monkeypatch):
    # The stage's first step is the fourth of all; the second of a resumed process is followed by a checkpoint.
    check(tiny_run_config, tmp_path, monkeypatch, None, [(4, 0.0), (2, 0.01)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("adapter", [None, {"rank": 4, "targets": ("attention",)}], ids=["weights", "adapters"])
def test_killed_at_random_moments(tiny_run_config, tmp_path, monkeypatch, adapter):
    rng = random.Random(1)
    moments = [
        (rng.randrange(4, 6), rng.uniform(0, 0.03)),
        *((rng.randrange(1, 3), rng.uniform(0, 0.03)) for _ in "12"),
    ]
    check(tiny_run_config, tmp_path, monkeypatch, adapter, moments)
