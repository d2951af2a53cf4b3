"""SIGKILL of a training process at twenty random moments: the resumed run is bit for bit the uninterrupted one.

Some fall into loading, some into steps, some into a checkpoint being written. The processes are forks of one that has
imported everything, so that twenty of them take no longer than a few.
"""

import random
import signal
import subprocess
import sys

import pytest
import torch
from interrupted import assert_same_run, course
from safetensors.torch import load_file

from benthic.config.load import dump_toml

# Reads lines: a directory, the kind of moment, and three numbers. Writes the signal that ended the child, or 0.
SERVER = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from benthic import api
from benthic.config.load import load_run_config
from benthic.train import checkpoint, loop

config, threads = load_run_config(sys.argv[1]), int(sys.argv[2])
# Not measured, to save a second.
loop.measure_gemm_gflops = lambda *of: 100.0
real_step, real_write, real_sync = loop.train_step, checkpoint._write, checkpoint.sync

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child(out, kind, number, part, delay):
    steps = writes = syncs = 0
    far_enough = threading.Event()

    def step(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == number:
            far_enough.set()
        return real_step(*args, **kwargs)

    def write(*args):
        nonlocal writes, syncs
        writes, syncs = writes + 1, 0
        return real_write(*args)

    def sync(path):
        nonlocal syncs
        syncs += 1
        if (writes, syncs) == (number, part):
            die()
        real_sync(path)

    def kill():
        if kind == "loading":
            far_enough.wait(delay)
        else:
            far_enough.wait()
            time.sleep(delay)
        die()

    if kind in ("loading", "step"):
        loop.train_step = step
        threading.Thread(target=kill, daemon=True).start()
    elif kind == "write":
        checkpoint._write, checkpoint.sync = write, sync
    torch.set_num_threads(threads)
    api.train(config, out)

for line in sys.stdin:
    out, kind, number, part, delay = line.split()
    pid = os.fork()
    if pid == 0:
        child(Path(out), kind, int(number), int(part), float(delay))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""

STEPS = 130
STEPS_BETWEEN_KILLS = 5
"""At most: twenty kills must not outlast the run."""


@pytest.fixture
def train_until(tiny_run_config, tmp_path):
    """Train in a process of its own until a moment; returns the signal that it died of."""
    config = tiny_run_config(
        steps=STEPS, checkpoint_every=2, validate_every=50, optimizer={"name": "muon"}, ema_decay=0.9
    )
    (tmp_path / "recipe.toml").write_text(dump_toml(config))
    command = [sys.executable, "-c", SERVER, str(tmp_path / "recipe.toml"), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def train(out, kind="end", number=0, part=0, delay=0.0) -> int:
            server.stdin.write(f"{out} {kind} {number} {part} {delay}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield train
        server.stdin.close()


def moments(rng: random.Random) -> list[tuple[str, int, int, float]]:
    """Twenty, in random order: kind, at which step or write, at which file of it, seconds after it."""
    loading = [("loading", STEPS_BETWEEN_KILLS, 0, rng.uniform(0, 0.5)) for _ in range(4)]
    steps = [("step", rng.randint(1, STEPS_BETWEEN_KILLS), 0, rng.uniform(0, 0.03)) for _ in range(8)]
    # Five files, the directory, and the directory above once the rename has been the commit.
    writes = [("write", rng.randint(1, 2), rng.randint(1, 7), 0.0) for _ in range(8)]
    return rng.sample([*loading, *steps, *writes], 20)


@pytest.mark.timeout(900)  # of a busy machine; half a minute of an idle one
@pytest.mark.parametrize("seed", [0])
def test_killed_twenty_times(train_until, make_run, seed):
    whole, out = make_run("whole"), make_run("killed")
    assert train_until(whole) == 0
    torn = 0
    for moment in moments(random.Random(seed)):
        assert train_until(out, *moment) == signal.SIGKILL, moment
        torn += len(list((out / "checkpoints").rglob(".step-*.tmp")))
    assert torn >= 5, "no kill fell into a checkpoint being written"
    assert train_until(out) == 0
    assert_same_run(out, whole)
    assert [row["step"] for row in course(out) if "loss" in row] == list(range(1, STEPS + 1))
    ours, others = final_weights(out), final_weights(whole)
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in others)


def final_weights(out) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)
