"""SIGKILL of a whole run, in any stage and between them: run again, it ends bit for bit as one that was left alone."""

import random
import signal
import subprocess
import sys

import pytest
import torch
from interrupted import assert_same_run

from benthic.config.load import dump_toml
from benthic.evaluate.records import EvaluationRecord

# A thread kills the process some time after a function has been called for so many times.
CHILD = """
import importlib, os, pathlib, signal, sys, threading, time
import torch

recipe, out, module, name, number, delay, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
from benthic.run import forecast, whole
from benthic.config.load import load_run_config
from benthic.train import loop
loop.measure_gemm_gflops = lambda *of: 100.0
forecast.measure_gemm_gflops = lambda: 100.0

def kill():
    time.sleep(float(delay))
    os.kill(os.getpid(), signal.SIGKILL)

holder = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    holder = getattr(holder, part)
original, called = getattr(holder, last), 0

def counted(*args, **kwargs):
    global called
    called += 1
    if called == int(number):
        threading.Thread(target=kill, daemon=True).start()
    return original(*args, **kwargs)

setattr(holder, last, counted)
out = pathlib.Path(out)
whole.run(whole.plan(load_run_config(recipe), out), out)
# It is killed even if it was at its end already, for else nothing would have been tried.
time.sleep(float(delay) + 1)
sys.exit(0 if called >= int(number) else 3)
"""
STEP = "benthic.train.loop", "train_step"
RECORDED = "benthic.evaluate.records", "EvaluationRecord.save"
MOMENTS = {
    "data": (("benthic.run.whole", "prepare"), 1, 0.3),
    "problems and samples": (("benthic.api", "prepare_sft"), 1, 0.1),
    "first step": (STEP, 1, 0.02),
    "pretraining": (STEP, 4, 0.03),
    "a later step": (STEP, 3, 0.1),
    "between stages": (("benthic.train.loop", "_Trainer.begin"), 2, 0.01),
    "rollouts": (("benthic.posttrain.rollouts", "Sampler.sample"), 3, 0.1),
    "before evaluation": (("benthic.run.whole", "_evaluate"), 1, 0.0),
    "a record": (RECORDED, 2, 0.0),
    "another record": (RECORDED, 7, 0.2),
    "an answer": (("benthic.run.measures", "answers"), 1, 0.05),
    "export": (("benthic.run.whole", "export_trained"), 1, 0.02),
    "weights": (("benthic.api", "save_hf"), 1, 0.01),
    "report": (("benthic.run.whole", "write_report"), 1, 0.0),
    "account": (("benthic.train.ledger", "Ledger.write"), 2, 0.0),
}


def check(whole_config, whole_run, tmp_path, moments) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "killed"
    recipe.write_text(dump_toml(whole_config()))
    for (module, name), number, delay in moments:
        killed = child(recipe, out, module, name, number, delay)
        assert killed.returncode == -signal.SIGKILL, (module, name, killed.returncode, killed.stderr.decode())
    last = child(recipe, out, *STEP, 10**9, 0.0)
    assert last.returncode == 3, last.stderr.decode()
    assert_same_run(out, whole_run)
    for folder, kept in (("data", True), ("sft", True), ("problems", True), ("model", False)):
        for path in sorted((whole_run / folder).iterdir()):
            if kept or path.suffix == ".safetensors":
                assert (out / folder / path.name).read_bytes() == path.read_bytes(), path
    clock = {"when": "", "seconds": 0.0}
    for path in (whole_run / "evaluation").iterdir():
        ours, theirs = (EvaluationRecord.load(one / "evaluation" / path.name) for one in (out, whole_run))
        assert ours.model_copy(update=clock) == theirs.model_copy(update=clock)
    assert (out / "report.html").is_file()
    assert (out / "model" / "README.md").is_file()


def child(recipe, out, *moment):
    arguments = map(str, (recipe, out, *moment, torch.get_num_threads()))
    return subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False, capture_output=True, timeout=280)


def test_killed_in_evaluation(whole_config, whole_run, tmp_path):
    check(whole_config, whole_run, tmp_path, [MOMENTS["a record"]])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_everywhere(whole_config, whole_run, tmp_path):
    check(whole_config, whole_run, tmp_path, MOMENTS.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(whole_config, whole_run, tmp_path, seed):
    """Of those that the run comes to, in order; the delays are drawn."""
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(MOMENTS)), 6))
    drawn = [(what, 1, rng.uniform(0, 0.2)) for what, _, _ in (list(MOMENTS.values())[place] for place in chosen)]
    check(whole_config, whole_run, tmp_path, drawn)
