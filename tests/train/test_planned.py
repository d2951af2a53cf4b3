"""The plan of a run: its keys, that its parts add up, and that it chooses layouts that fit."""

import math

import pytest

import benthic
from benthic.config.load import load_preset_or_recipe, load_run_config
from benthic.errors import InputError
from benthic.plan.hardware import GPUS
from benthic.train.dry_run import dry_run
from benthic.train.planned import step_time

SMALL = ("model.preset=bench-108m", "train.steps=100", "train.batch_size=64", "train.sequence_length=512")


def small(*settings):
    return load_run_config("tiny", [*SMALL, *settings])


def test_parts_of_a_step_add_up():
    plan = benthic.plan(small("parallel.pipeline=2", "parallel.expert=8", "train.micro_batch_size=1"))
    (phase,) = plan.phases
    assert sum(phase.step_parts.values()) == pytest.approx(plan.step_seconds) == pytest.approx(phase.step_seconds)
    assert plan.gpus == 16
    assert plan.gpu_hours == pytest.approx(100 * plan.step_seconds * 16 / 3600)
    assert plan.cost_usd == pytest.approx(2 * plan.gpu_hours)
    assert plan.energy_kwh == pytest.approx(0.7 * plan.gpu_hours)
    assert (phase.tokens, phase.steps) == (100 * 64 * 512, 100)
    waiting = phase.step_parts["waiting"] / (phase.step_parts["waiting"] + phase.step_parts["computing"])
    assert waiting == pytest.approx(plan.bubble_share)


def test_a_run_of_one_gpu_waits_for_nobody():
    plan = benthic.plan(small("train.micro_batch_size=1"))
    assert (plan.gpus, plan.bubble_share) == (1, 0.0)
    (phase,) = plan.phases
    assert phase.step_parts["exchanging"] == phase.step_parts["reducing"] == 0


def test_a_price_of_the_recipe_is_taken():
    cheap = benthic.plan(small("train.price_per_hour=0.5"))
    assert cheap.cost_usd == pytest.approx(0.5 * cheap.gpu_hours)


def test_minutes_are_so_many_hours():
    plan = benthic.plan(load_run_config("tiny", ["train.minutes=30", "train.batch_size=64"]))
    assert plan.gpu_hours == pytest.approx(0.5, rel=0.01)


def test_smaller_batches_of_a_ramp_take_less_time():
    whole = benthic.plan(small())
    ramped = benthic.plan(small("train.schedule.batch_ramp=0.5", "train.schedule.batch_ramp_start=0.5"))
    assert 0.5 < ramped.gpu_hours / whole.gpu_hours < 0.95
    assert ramped.gpu_hours / whole.gpu_hours == pytest.approx(ramped.phases[0].tokens / whole.phases[0].tokens)


def test_phases_of_context_extension_are_planned_too():
    plan = benthic.plan(load_run_config("extend", ["train.steps=100"]))
    assert plan.phases[0].name == "pretrain"
    assert len(plan.phases) > 1
    assert plan.gpu_hours == pytest.approx(sum(phase.gpu_hours for phase in plan.phases))


@pytest.mark.parametrize("gpus", [2, 8, 12])
def test_a_layout_is_chosen_that_is_the_fastest_of_those_that_fit(gpus):
    plan = benthic.plan(small("train.batch_size=96"), gpus=gpus, gpu=GPUS["RTX 4090"])
    sizes = [plan.parallel[axis] for axis in ("pipeline", "expert", "shard", "replicate")]
    assert plan.gpus == math.prod(sizes) == gpus
    assert plan.fits
    # What was chosen is no slower than data parallelism alone.
    alone = small("train.batch_size=96", f"parallel.shard={gpus}", "train.micro_batch_size=1")
    assert plan.step_seconds <= step_time(alone, dry_run(alone), GPUS["RTX 4090"]).total * 1.0001


def test_what_no_layout_fits_is_refused():
    with pytest.raises(
        InputError, match=r"--gpus 11: no layout fits; of the last that was tried: train\.batch_size=64"
    ):
        benthic.plan(small(), gpus=11)


def test_a_faster_gpu_computes_faster():
    times = {name: benthic.plan(small(), gpu=GPUS[name]).step_seconds for name in GPUS}
    assert times["B200"] < times["MI300X"] < times["H100"] < times["A100"] < times["RTX 4090"]


def test_the_recipe_goes_before_the_preset_of_its_name_if_asked_for():
    assert load_preset_or_recipe("v3-671b").parallel.processes == 1
    config = load_preset_or_recipe("v3-671b", prefer_recipe=True)
    assert config.train.batch_size == 15360
    assert config.parallel.processes == 2048
