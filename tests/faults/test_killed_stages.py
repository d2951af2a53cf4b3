"""SIGKILL of a process in the stages after pretraining: the resumed run is bit for bit the uninterrupted one."""

import random
import signal
import subprocess
import sys

import pytest
import torch
from interrupted import assert_same_run

from benthic.config.load import dump_toml
from benthic.train.checkpoint import committed
from benthic.train.loop import train

# A thread kills the process some time after a given step of a given length of sequence has begun.
CHILD = """
import os, pathlib, signal, sys, threading, time
import torch
import benthic
from benthic.train import loop

out, length, number, delay = pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
torch.set_num_threads(int(sys.argv[6]))
loop.measure_gemm_gflops = lambda *of: 100.0
real_step, taken = loop.train_step, 0

def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def step(objective, optimizer, batch, *args, **kwargs):
    global taken
    taken += batch.tokens_BS.shape[1] == length + 2
    if taken == number:
        threading.Thread(target=kill, daemon=True).start()
    return real_step(objective, optimizer, batch, *args, **kwargs)

loop.train_step = step
from benthic.config.load import load_run_config
benthic.train(load_run_config(sys.argv[1]), out)
"""
PHASES = [{"sequence_length": 64, "steps": 10}, {"sequence_length": 128, "steps": 10}]


def run_and_kill(recipe, out, length: int, number: int, delay: float) -> int:
    arguments = map(str, (recipe, out, length, number, delay, torch.get_num_threads()))
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], check=False, capture_output=True, timeout=250
    ).returncode


def check(tiny_run_config, make_run, tmp_path, kills: list[tuple[int, int, float]]) -> None:
    config = tiny_run_config(steps=6, checkpoint_every=3, validate_every=5, optimizer={"name": "muon"}, extend=PHASES)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(config))
    whole, out = make_run("whole"), make_run("killed")
    train(config, whole)
    for length, number, delay in kills:
        assert run_and_kill(recipe, out, length, number, delay) == -signal.SIGKILL, (length, number)
        assert not committed(out / "checkpoints" / "extend-2") or length == 128
    train(config, out)
    assert_same_run(out, whole)


def test_killed_within_the_second_stage(tiny_run_config, make_run, tmp_path):
    # Its first step, of which there is no checkpoint yet, and one while a checkpoint is written.
    check(tiny_run_config, make_run, tmp_path, [(64, 1, 0.0), (64, 4, 0.01)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments_of_every_stage(tiny_run_config, make_run, tmp_path):
    rng = random.Random(0)
    moments = [(length, rng.randrange(1, 4), rng.uniform(0, 0.03)) for length in (32, 64, 64, 128, 128)]
    check(tiny_run_config, make_run, tmp_path, moments)
