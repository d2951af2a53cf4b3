"""Faults of one process among several: all of them agree on what happened, and say the same."""

import resource
import signal

import pytest
import torch
from processes import run_processes

from benthic.config.schema import RunConfig
from benthic.errors import InputError, WorkFailed
from benthic.parallel.group import Group
from benthic.parallel.local import local
from benthic.train import loop
from benthic.train.checkpoint import committed, load
from benthic.train.corpus import CorpusWork
from benthic.train.metrics import read_metrics

WORLD = 3


def train(config: RunConfig, out: str) -> str:
    """Run to the end, or to an error that is told."""
    loop.measure_gemm_gflops = lambda *of: 100.0
    try:
        loop.train(config, out, world=Group(config.parallel))
    except (InputError, WorkFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def after_step(number: int, act) -> None:
    """Do something once a step is over, with the trainer."""
    original = loop._Trainer._end_step

    def end_step(self, *arguments):
        if self.state.step == number:
            act(self)
        original(self, *arguments)

    loop._Trainer._end_step = end_step


def limit_files(rank: int, config: RunConfig, out: str) -> str:
    """From step 6 on, the system lets rank 1 write small files only."""

    def limit(trainer) -> None:
        trainer.writer.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    if rank == 1:
        after_step(6, limit)
    return train(config, out)


def flip_a_bit(rank: int, config: RunConfig, out: str, name: str) -> str:
    """In rank 1's copy of a tensor, after step 5."""

    def flip(trainer) -> None:
        tensor = local(trainer.state.model.state_dict()[name].detach())
        tensor.view(torch.int32).flatten()[3] ^= 1 << 2

    if rank == 1:
        after_step(5, flip)
    return train(config, out)


def lose_a_gradient(rank: int, config: RunConfig, out: str) -> str:
    """In step 6, rank 1 has a gradient that is not a number, however often it tries."""
    original = CorpusWork.gradients

    def gradients(self, objective, batch, settings, **options):
        losses = original(self, objective, batch, settings, **options)
        if settings.first_sequence == 5 * config.train.batch_size:
            local(objective.model.transformer.norm.weight.grad)[0] = torch.nan
        return losses

    if rank == 1:
        CorpusWork.gradients = gradients
    return train(config, out)


@pytest.fixture
def config(tiny_run_config):
    def build(**parallel) -> RunConfig:
        usual = tiny_run_config(batch_size=6, steps=12, checkpoint_every=4, validate_every=50, keep_checkpoints=3)
        return RunConfig.model_validate(
            usual.model_dump(mode="json") | {"parallel": {"timeout_seconds": 60, **(parallel or {"shard": WORLD})}}
        )

    return build


def test_a_disk_that_one_rank_cannot_write_to(config, make_run):
    out = make_run()
    said = run_processes(limit_files, WORLD, config(), str(out))
    assert len(set(said)) == 1
    assert "step-8: not saved (rank 1: " in said[0]
    assert said[0].startswith("CheckpointFailed: ")
    assert "earlier checkpoints are intact" in said[0]
    (left,) = committed(out / "checkpoints" / "pretrain")
    assert load(left).state["step"] == 4
    assert run_processes(_train, WORLD, config(), str(out)) == ["done"] * WORLD
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


def _train(rank: int, config: RunConfig, out: str) -> str:
    return train(config, out)


def test_a_damaged_part_is_refused_by_all_and_named(config, make_run):
    out = make_run()
    assert run_processes(_train, WORLD, config(), str(out)) == ["done"] * WORLD
    damaged = out / "checkpoints" / "pretrain" / "step-12" / "optimizer-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 4
    damaged.write_bytes(content)
    for parallel in ({"shard": 3}, {"replicate": 3}):
        said = run_processes(_train, WORLD, config(**parallel), str(out))
        assert len(set(said)) == 1
        assert said[0].startswith(f"InputError: {damaged}: damaged")
        assert "to resume from step-8 instead, remove" in said[0]


@pytest.mark.parametrize(
    "name",
    ["transformer.layers.1.ffn.experts.down", "transformer.layers.1.ffn.router.bias", "transformer.embed.weight"],
)
def test_a_flipped_bit_in_one_copy_is_found_within_as_many_steps(config, make_run, name):
    out = make_run()
    said = run_processes(flip_a_bit, WORLD, config(replicate=WORLD, hash_every=3), str(out), name)
    assert len(set(said)) == 1
    assert said[0].startswith("CopiesDiffer: ")
    assert " of rank 1 differs from that of ranks 0 and 2" in said[0]
    rows = read_metrics(out / "metrics.jsonl")
    assert 5 <= rows[-1]["step"] <= 5 + 3
    # What was saved has no flipped bit in it.
    (left,) = committed(out / "checkpoints" / "pretrain")
    assert load(left).state["step"] == 4


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"replicate": 2}], ids=["embedding", "everything"])
def test_copies_stay_equal_bit_for_bit(config, make_run, parallel):
    """The embedding that first and last stage share has its own optimizer's states on either."""
    out = make_run()
    assert run_processes(_train, 2, config(**parallel, hash_every=1), str(out)) == ["done"] * 2
    assert not [row for row in read_metrics(out / "metrics.jsonl") if "event" in row]


def test_a_gradient_of_one_rank_that_is_no_number(config, make_run):
    out = make_run()
    said = run_processes(lose_a_gradient, WORLD, config(replicate=WORLD, hash_every=1), str(out))
    assert said == ["done"] * WORLD
    (event,) = [row for row in read_metrics(out / "metrics.jsonl") if "event" in row]
    assert event["event"] == "update skipped"
    assert event["step"] == 6
    assert event["sequences"] == [30, 35]
    weights = load(committed(out / "checkpoints" / "pretrain")[-1]).tensors["model"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
