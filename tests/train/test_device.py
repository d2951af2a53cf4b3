"""A run whose model is not on the CPU: every step, validation and checkpoint, on a device that is none."""

import sys
from contextlib import nullcontext

import pytest
import torch
from interrupted import Killed, at_step, course, ended, kill
from second_device import SecondDevice

from benthic.config.posttrain import PosttrainConfig
from benthic.config.stages import stages
from benthic.errors import InputError
from benthic.model import build_model
from benthic.train import loop, state
from benthic.train.loop import train

KINDS = {
    "adamw, average, documents": {"ema_decay": 0.9, "mask_documents": True},
    "muon, micro-batches": {"optimizer": {"name": "muon", "learning_rate": 3e-3}, "micro_batch_size": 2},
    "mtp later": {"schedule": {"mtp_loss_weight": 0.0, "mtp_late_start": 0.3, "mtp_from_last_layer": True}},
    "longer context": {"extend": [{"sequence_length": 64, "steps": 2}]},
}


def computing(config, compute):
    return config.model_copy(update={"precision": config.precision.model_copy(update={"compute": compute})})


def stand_in(monkeypatch):
    """Let the other device stand for a GPU."""
    monkeypatch.setattr(loop, "refuse_stages_without_device", lambda stages: None)
    monkeypatch.setattr(state, "device_of", lambda train: torch.device("lazy" if train.device == "cuda" else "cpu"))
    # Both know what devices there are.
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: nullcontext())
    fused = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: ["cpu", "lazy"])


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_elsewhere_is_that_of_the_cpu(tiny_run_config, make_run, monkeypatch, kind, compute):
    settings = {"steps": 6, "checkpoint_every": 3, "validate_every": 3} | KINDS[kind]
    here, there = make_run("here"), make_run("there")
    monkeypatch.setattr("benthic.ops.native.usable", lambda *tensors: False)  # PyTorch's own operations on both sides
    train(computing(tiny_run_config(**settings), compute), here)
    stand_in(monkeypatch)
    with SecondDevice():
        config = computing(tiny_run_config(**settings, device="cuda"), compute)
        moved = train(config, there)
        assert {parameter.device.type for parameter in moved.model.parameters()} == {"lazy"}
        train(config, there)  # read again, it is finished
    # AdamW's first steps are as long for a small gradient as for a large one, whatever it was rounded to.
    tolerance = 1e-2 if compute == "fp32" else 3e-2
    for row, expected in zip(course(there), course(here), strict=True):
        assert row.keys() == expected.keys()
        # To lend its weights to the model, an average swaps memory, of which the stand-in has none.
        for key in ("loss", "grad_norm", "validation_bits_per_byte"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=tolerance), (row["step"], key)
    stage = "extend-1" if "extend" in KINDS[kind] else "pretrain"
    left, right = ended(there, stage), ended(here, stage)
    began = dict(build_model(config.model, seed=config.train.seed).named_parameters())
    for group, tensors in right.tensors.items():
        for name, tensor in tensors.items():
            assert left.tensors[group][name].shape == tensor.shape
            if compute == "fp32" and group == "model" and name in began:
                learnt = (tensor - began[name]).norm()
                assert (left.tensors[group][name] - tensor).norm() <= 0.2 * learnt, name


def test_a_run_goes_on_on_another_device(tiny_run_config, make_run, monkeypatch):
    settings = {"steps": 6, "checkpoint_every": 2}
    here, there = make_run("here"), make_run("there")
    train(tiny_run_config(**settings), here)
    with monkeypatch.context() as patch:
        stand_in(patch)
        at_step(patch, 4, kill)
        with SecondDevice(), pytest.raises(Killed):
            train(tiny_run_config(**settings, device="cuda"), there)
    train(tiny_run_config(**settings), there)
    left, right = ([row["loss"] for row in course(out) if "loss" in row] for out in (there, here))
    assert left == pytest.approx(right, rel=1e-2)


def test_what_comes_after_pretraining_is_on_the_cpu(tiny_run_config):
    config = tiny_run_config(device="cuda", extend=[{"sequence_length": 64, "steps": 2}])
    config = config.model_copy(update={"posttrain": PosttrainConfig(sft={"steps": 2})})
    assert [stage.config.train.device for stage in stages(config)] == ["cuda", "cuda", "cpu"]


def test_tensors_on_two_devices_are_an_error():
    """What this file rests on."""
    with SecondDevice():
        weight = torch.ones(3, 2, device="lazy")
        assert weight.device.type == "lazy"
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(4, 3) @ weight
        assert (torch.ones(4, 3).to("lazy") @ weight).cpu().tolist() == [[3.0, 3.0]] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_of(tiny_run_config, make_run):
    with pytest.raises(InputError, match=r'train\.device="cuda": PyTorch finds no GPU here'):
        train(tiny_run_config(device="cuda"), make_run())
