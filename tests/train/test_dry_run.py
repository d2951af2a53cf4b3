"""Dry runs of jobs that no test could run, by sums that must come out; small ones are in tests/distributed."""

import json
import re
import resource
import time

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benthic.config.load import load_run_config
from benthic.config.presets import PRESETS
from benthic.errors import InputError
from benthic.model import build_model
from benthic.parallel.group import Group
from benthic.parallel.local import local
from benthic.plan.counts import main_model, mtp_modules
from benthic.plan.hardware import GPUS
from benthic.train.dry_run import dry_run, held_by
from benthic.train.dry_run_report import report_json, report_lines
from benthic.train.objective import Objective


def v3(*settings):
    return load_run_config("v3-671b", settings)


def test_v3_on_2048_ranks_in_seconds():
    """Its time and memory have bounds: 60 s and 8 GiB on a laptop."""
    start = time.process_time()
    run = dry_run(v3())
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20
    assert (run.processes, run.passes, len(run.stages)) == (2048, 120, 16)
    config = PRESETS["v3-671b"]
    assert run.total_parameters == main_model(config).total + mtp_modules(config).total
    # A rank of DualPipeV holds PP + 1 of the PP halves that its layers make.
    assert {sum(stage.in_flight.values()) for stage in run.stages} == {33}


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_all_ranks_together_hold_the_model(schedule):
    config = load_run_config(
        "tiny", ["parallel.pipeline=2", "parallel.expert=4", "parallel.shard=3", "model.num_hidden_layers=5",
                 "train.batch_size=24", "train.micro_batch_size=1", f"parallel.schedule={schedule}"]
    )  # fmt: skip
    run = dry_run(config)
    held = sum(held_by(config, rank).parameters for rank in range(24))
    # Where the last stage is not on the first rank, its MTP module embeds with a copy.
    copy = 0 if schedule == "dualpipev" else config.model.vocab_size * config.model.hidden_size
    assert held == run.total_parameters + copy


@pytest.mark.parametrize("rank", [129, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (0, 700, 2047))])
def test_ranks_of_v3_hold_what_the_code_that_divides_it_leaves_them(rank):
    """The very functions of a real run, among 2,048 processes that are not there."""
    config = v3("precision.compute=bf16", "parallel.fp8_dispatch=false")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2048)
    try:
        objective = Objective(build_model(config.model, device="meta"))
        Group(config.parallel).spread(objective, "bf16", config.train.sequence_length)
        held = sum(local(p).numel() for p in objective.parameters())
    finally:
        dist.destroy_process_group()
    assert held == held_by(config, rank).parameters


def test_without_tensor_parallelism_only_activations_are_too_much():
    """The report fits 80 GB; its weights, gradients and optimizer state, as here, take a fifth of that."""
    memory = dry_run(v3("precision.compute=bf16", "parallel.fp8_dispatch=false")).fullest.memory
    assert memory.total - memory.activations < 20e9
    assert memory.total > 80e9
    fused = dry_run(v3("precision.compute=bf16", "parallel.fp8_dispatch=false", "parallel.schedule=1f1b"), fused=True)
    assert fused.fullest.memory.total < 80e9


def test_recomputation_and_shorter_pipelines_keep_less():
    kept, again = (dry_run(config, fused=True).fullest for config in (v3("train.recompute=false"), v3()))
    assert kept.memory.activations > 1.3 * again.memory.activations
    small = ["model.preset=lite-16b", "train.batch_size=64", "train.micro_batch_size=1", "train.sequence_length=2048"]
    one, eight = (
        dry_run(load_run_config("tiny", [*small, "parallel.pipeline=8", f"train.batch_size={batch}"]), strict=False)
        for batch in (1, 64)
    )
    assert eight.stages[0].memory.activations == 8 * one.stages[0].memory.activations


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match=r"parallel.expert=48 must divide model.n_routed_experts=256"):
        dry_run(v3("parallel.expert=48"))


def test_the_report_says_whether_it_fits_and_by_how_much():
    *_, verdict, least = report_lines(v3(), GPUS["H800"])
    pattern = r"does not fit H800, 80 GB: the fullest ranks, ([\d-]+), hold ([\d.]+) GB, ([\d.]+) GB too much"
    found = re.fullmatch(pattern, verdict)
    assert found
    assert float(found[2]) - float(found[3]) == pytest.approx(80)
    assert "would hold" in least
    tiny = load_run_config("tiny")
    assert any(line.startswith("fits RTX 4090, 24 GB: the fullest ranks, 0, hold")
               for line in report_lines(tiny, GPUS["RTX 4090"]))  # fmt: skip


def test_the_report_for_programs():
    found = json.loads(json.dumps(report_json(v3(), GPUS["H200"])))
    run = dry_run(v3())
    assert found["needed_bytes"] == max(stage["memory"]["total"] for stage in found["stages"])
    assert found["fits"] is (found["needed_bytes"] <= 141e9)
    for stage, said in zip(run.stages, found["stages"], strict=True):
        assert said["memory"]["total"] == sum(vars(stage.memory).values())
        assert said["messages"]["total"] == sum(vars(stage.messages).values())
        assert said["ranks"] == [stage.ranks[0], stage.ranks[-1]]
