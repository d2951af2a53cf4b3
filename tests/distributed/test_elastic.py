"""torchrun starts all processes again when one is lost, and the run goes on from its last checkpoint, bit for bit."""

import importlib.util
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from interrupted import assert_same_run, course
from safetensors.torch import load_file

from benthic.config.load import dump_toml
from benthic.config.schema import RunConfig
from benthic.train.checkpoint import committed, load

SPEC = importlib.util.spec_from_file_location("kill_ranks", Path(__file__).parents[2] / "benchmarks" / "kill_ranks.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture
def recipe(tiny_run_config, tmp_path):
    """Settings on disk; keywords of ``parallel`` and ``train``."""

    def write(parallel, **train) -> Path:
        config = tiny_run_config(
            **{"checkpoint_every": 3, "ema_decay": 0.9, "validate_every": 50, "micro_batch_size": 1, **train}
        )
        config = RunConfig.model_validate(config.model_dump(mode="json") | {"parallel": parallel})
        path = tmp_path / "recipe.toml"
        path.write_text(dump_toml(config))
        return path

    return write


@pytest.fixture
def running():
    """Starts runs, and leaves none behind."""
    started = []

    def run(*arguments, **options):
        started.append(script.start(*arguments, **options))
        return started[-1]

    yield run
    for one in started:
        if one.poll() is None:
            script.stop(one)


def final_weights(out) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_end(out, whole) -> None:
    assert_same_run(out, whole)
    ours, others = final_weights(out), final_weights(whole)
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in others.items())


@pytest.mark.slow
@pytest.mark.timeout(9000)
@pytest.mark.parametrize(
    "parallel",
    [{"expert": 2, "replicate": 2, "hash_every": 5}, {"pipeline": 2, "shard": 2, "schedule": "zbv"}],
    ids=lambda parallel: "-".join(map(str, parallel.values())),
)
def test_ten_kills_of_random_ranks_of_four(recipe, running, make_run, parallel):
    settings = recipe({**parallel, "timeout_seconds": 300}, steps=120)
    whole, out = make_run("whole"), make_run("killed")
    undisturbed = running(4, settings, whole)
    assert undisturbed.wait(2400) == 0, script.said(whole)
    disturbed = running(4, settings, out, restarts=10)
    killed = script.kill_random_ranks(disturbed, out, 10, random.Random(0))
    assert len(killed) == 10
    assert len(set(killed)) > 1
    assert disturbed.wait(2400) == 0, script.said(out)
    assert_same_end(out, whole)
    assert [row["step"] for row in course(out) if "loss" in row] == list(range(1, 121))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_stopped_rank_is_named_and_the_run_begins_again(recipe, running, make_run):
    settings = recipe({"replicate": 2, "timeout_seconds": 20}, steps=60)
    out, whole = make_run("stopped"), make_run("whole")
    assert running(2, settings, whole).wait(1200) == 0
    run = running(2, settings, out, restarts=1)
    assert script.wait_for(lambda: script.rows(out) > 10, run)
    stopped = script.workers(run)[1]
    stopped.send_signal(signal.SIGSTOP)
    at = time.time()
    assert script.wait_for(lambda: (out / "stacks-0.txt").exists(), run)
    assert time.time() - at < 20
    assert run.wait(1200) == 0
    told = script.said(out)
    assert f"rank 0: no sign of life of rank 1 (process {stopped.pid} on " in told
    for rank in range(2):
        assert "train_step" in (out / f"stacks-{rank}.txt").read_text()
    assert_same_end(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sigterm_saves_and_another_layout_goes_on(recipe, running, make_run):
    """Fault 6 and fault 5: stopped by a signal, and resumed by another number of processes."""
    settings = recipe({"expert": 2}, steps=40)
    out = make_run("stopped")
    run = running(2, settings, out)
    assert script.wait_for(lambda: script.rows(out) > 10, run)
    script.workers(run)[0].send_signal(signal.SIGTERM)
    assert run.wait(300) != 0
    told = script.said(out)
    assert "exitcode  : 143" in told.replace("exitcode :", "exitcode  :"), told
    steps = [row["step"] for row in course(out) if "loss" in row]
    assert load(committed(out / "checkpoints" / "pretrain")[-1], groups=()).state["step"] == steps[-1]
    other = running(4, recipe({"pipeline": 2, "shard": 2}, steps=40), out)
    assert other.wait(1200) == 0, script.said(out)
    assert [row["step"] for row in course(out) if "loss" in row] == list(range(1, 41))
