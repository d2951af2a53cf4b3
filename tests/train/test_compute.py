"""Precision for the length of a call: which kernels training steps run on, and where tiles are refused."""

import pytest
import torch
from spread import settings, spread_over

from benthic.config.load import load_run_config
from benthic.config.presets import PRESETS
from benthic.errors import InputError
from benthic.lab.bench_stages import bench_stages
from benthic.lab.bench_train import bench_train
from benthic.model import build_model
from benthic.ops import native
from benthic.run.whole import plan, run
from benthic.train.compute import compute_in, refuse_without_tiles
from benthic.train.loop import train

WIDE = PRESETS["tiny"].model_copy(update={"hidden_size": 256})


def gradients(compute):
    model = build_model(WIDE).transformer
    compute_in(compute, model, torch.arange(120)[None]).float().square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("compute", ["fp32", "fp32-tiles", "bf16", "fp8"])
def test_training_multiplies_by_own_kernels_where_that_is_asked_for_or_faster(monkeypatch, compute):
    calls, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *args: calls.append(name) or call(name, *args))
    gradients(compute)
    on_tiles = compute == "fp32-tiles" and native.has_tiles()
    assert ("product" in calls) == (on_tiles or (compute.startswith("fp32") and native.has_fast_vectors()))


def test_it_is_fp32():
    for one, other in zip(gradients("fp32-tiles"), gradients("fp32"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


def test_it_is_refused_without_tiles_before_anything_is_done(monkeypatch, tmp_path):
    monkeypatch.setenv("BENTHIC_NATIVE", "blas")
    refuse_without_tiles("fp32")
    config = settings(compute="fp32-tiles")
    staged = spread_over(config, pipeline=2)
    for refused in (lambda: bench_train(config), lambda: bench_stages(staged), lambda: train(config, tmp_path / "run")):
        with pytest.raises(InputError, match=r"precision\.compute=fp32-tiles: .*fp32 is as exact"):
            refused()
    assert list(tmp_path.iterdir()) == []


def test_the_setting_that_asks_for_tiles_is_named_before_the_first_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("BENTHIC_NATIVE", "blas")
    config = load_run_config("quickstart", ["posttrain.rl.compute=fp32-tiles"])
    with pytest.raises(InputError, match=r"^posttrain\.rl\.compute=fp32-tiles: "):
        run(plan(config, tmp_path / "run"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
