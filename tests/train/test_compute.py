"""Precision for the length of a call: which products of a training step run on tiles, and what its reports say."""

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.model import build_model
from benthic.ops import native
from benthic.train.compute import compute_in, kernels_in

WIDE = PRESETS["tiny"].model_copy(update={"hidden_size": 256})


@pytest.mark.parametrize(("config", "compute", "wanted"), [
    (WIDE, "fp32", True), (PRESETS["tiny"], "fp32", False), (WIDE, "bf16", False), (WIDE, "fp8", False),
])  # fmt: skip
def test_wide_models_in_fp32_are_on_tiles(monkeypatch, config, compute, wanted):
    on_tiles = wanted and native.has_tiles()
    model, calls, call = build_model(config), [], native.call
    monkeypatch.setattr(native, "call", lambda name, *args: calls.append(name) or call(name, *args))
    compute_in(compute, model.transformer, torch.arange(120)[None]).float().sum().backward()
    assert ("product" in calls) == on_tiles
    assert ("tiles" in kernels_in(compute, model)) == on_tiles


def test_without_tiles_there_are_none(monkeypatch):
    monkeypatch.setenv("BENTHIC_NATIVE", "blas")
    assert kernels_in("fp32", build_model(WIDE)) == native.status()
