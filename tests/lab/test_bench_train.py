"""`bench train`: its share of the peak follows from what a step does."""

import statistics

import pytest

from benthic.errors import InputError
from benthic.lab import bench_train as module
from benthic.lab.bench_train import bench_train
from benthic.plan.flops import training_flops


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(module, "measure_gemm_gflops", lambda *of: 100.0)
    monkeypatch.setattr(module, "settle_memory", lambda: None)


@pytest.mark.parametrize("schedule", [{"mtp_loss_weight": 0.0}, {"mtp_loss_weight": 0.0, "mtp_late_loss_weight": 0.0}])
def test_operations_are_those_of_the_steps_timed(tiny_run_config, schedule):
    config = tiny_run_config(steps=3, schedule=schedule)
    speed = bench_train(config)
    with_mtp = len(schedule) == 1
    assert speed.tokens_per_s == pytest.approx(4 * 32 / statistics.median(speed.step_seconds))
    flops = training_flops(config.model, 32, mtp=with_mtp)
    assert flops != training_flops(config.model, 32, mtp=not with_mtp)
    assert speed.share_of_gemm_peak == pytest.approx(speed.tokens_per_s * flops / 100e9)
    assert (len(speed.step_seconds), speed.batch_size, speed.sequence_length, speed.precision) == (3, 4, 32, "fp32")


def test_what_does_not_say_what_to_measure_is_refused(tiny_run_config):
    config = tiny_run_config()
    auto = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "auto"})})
    with pytest.raises(InputError, match=r"precision\.compute=auto"):
        bench_train(auto)
    with pytest.raises(InputError, match=r"train\.minutes"):
        bench_train(tiny_run_config(steps=None, minutes=1.0))
