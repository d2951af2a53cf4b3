"""SIGKILL of a training process at random moments: the resumed run is bit for bit the uninterrupted one."""

import random
import signal
import subprocess
import sys

import pytest
import torch

from benthic.config.load import dump_toml
from benthic.train.checkpoint import committed, load
from benthic.train.loop import train
from benthic.train.metrics import read_metrics

# A thread kills the process some time after training has begun; the GEMM peak is not measured, to save a second.
CHILD = """
import os, pathlib, signal, sys, threading, time
import torch
import benthic
from benthic.train import loop

torch.set_num_threads(int(sys.argv[4]))
out, delay = pathlib.Path(sys.argv[2]), float(sys.argv[3])
loop.measure_gemm_gflops = lambda dtype: 100.0
first_step = threading.Event()
real_step = loop.train_step

def step(*args, **kwargs):
    first_step.set()
    return real_step(*args, **kwargs)

def kill():
    first_step.wait()
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

loop.train_step = step
threading.Thread(target=kill, daemon=True).start()
from benthic.config.load import load_run_config
benthic.train(load_run_config(sys.argv[1]), out)
"""


def run_and_kill(recipe, out, delay: float) -> int:
    command = [sys.executable, "-c", CHILD, str(recipe), str(out), str(delay), str(torch.get_num_threads())]
    return subprocess.run(command, check=False, capture_output=True, timeout=200).returncode


def check(tiny_run_config, make_run, tmp_path, kills: int, steps: int, seed: int) -> None:
    # A checkpoint at every second step: many of the kills fall into one being written.
    config = tiny_run_config(steps=steps, checkpoint_every=2, keep_checkpoints=2, optimizer={"name": "muon"})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(config))
    whole, out = make_run("whole"), make_run("killed")
    train(config, whole)
    rng = random.Random(seed)
    killed = [run_and_kill(recipe, out, rng.uniform(0.05, 0.5)) == -signal.SIGKILL for _ in range(kills)]
    assert killed[0], "the first kill came too late to test anything"
    train(config, out)
    assert losses(out) == losses(whole)
    left, right = (load(committed(run / "checkpoints" / "pretrain")[-1]) for run in (out, whole))
    for group, tensors in right.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(left.tensors[group][name], tensor), (group, name)


def losses(out) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def test_killed_a_few_times(tiny_run_config, make_run, tmp_path):
    check(tiny_run_config, make_run, tmp_path, kills=2, steps=40, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twenty_times(tiny_run_config, make_run, tmp_path):
    check(tiny_run_config, make_run, tmp_path, kills=20, steps=400, seed=1)
