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


# The writing thread kills the process at its n-th fsync of a given checkpoint, when training has gone two steps on.
WRITER = """
import os, pathlib, signal, sys, threading
import torch
import benthic
from benthic.train import background, checkpoint, loop

torch.set_num_threads(int(sys.argv[4]))
out, at = pathlib.Path(sys.argv[2]), int(sys.argv[3])
loop.measure_gemm_gflops = lambda dtype: 100.0
gone_on, steps, syncs = threading.Event(), 0, 0
real_step, real_save, real_sync = loop.train_step, background.save, checkpoint.sync

def step(*args, **kwargs):
    global steps
    steps += 1
    if steps == 7:
        gone_on.set()
    return real_step(*args, **kwargs)

def save(root, step, *rest):
    if step == 5:
        gone_on.wait()
        checkpoint.sync = sync
    return real_save(root, step, *rest)

def sync(path):
    global syncs
    syncs += 1
    if syncs == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real_sync(path)

loop.train_step, background.save = step, save
from benthic.config.load import load_run_config
benthic.train(load_run_config(sys.argv[1]), out)
"""


def run_and_kill(recipe, out, when: float, program: str = CHILD) -> int:
    command = [sys.executable, "-c", program, str(recipe), str(out), str(when), str(torch.get_num_threads())]
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
    assert_same_run(out, whole)


def assert_same_run(out, whole) -> None:
    assert losses(out) == losses(whole)
    left, right = (load(committed(run / "checkpoints" / "pretrain")[-1]) for run in (out, whole))
    for group, tensors in right.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(left.tensors[group][name], tensor), (group, name)


def losses(out) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def test_killed_a_few_times(tiny_run_config, make_run, tmp_path):
    check(tiny_run_config, make_run, tmp_path, kills=2, steps=40, seed=0)


@pytest.mark.parametrize(("sync", "newest"), [(1, 0), (4, 0), (6, 5)])
def test_killed_while_a_checkpoint_is_written_in_the_background(tiny_run_config, make_run, tmp_path, sync, newest):
    config = tiny_run_config(steps=10, checkpoint_every=5, optimizer={"name": "muon"})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(config))
    whole, out = make_run("whole"), make_run("killed")
    train(config, whole)
    assert run_and_kill(recipe, out, sync, WRITER) == -signal.SIGKILL
    assert [path.name for path in committed(out / "checkpoints" / "pretrain")] == ([f"step-{newest}"] if newest else [])
    train(config, out)
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twenty_times(tiny_run_config, make_run, tmp_path):
    check(tiny_run_config, make_run, tmp_path, kills=20, steps=400, seed=1)
