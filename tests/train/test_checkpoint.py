"""Checkpoints come back bit for bit, and only as many as asked for are kept."""

import json

import pytest
import torch

from benthic.errors import InputError
from benthic.train.checkpoint import Checkpoint, committed, copy_into, latest, load, save


def some_checkpoint(step: int = 12) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = {"a.weight": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()}
    optimizer = {"a.weight.step": torch.tensor(3.0), "a.weight.momentum": torch.randn(3, 5, generator=generator).mT}
    return Checkpoint({"model": model, "optimizer": optimizer}, {"step": step, "run": {"nested": [1, None, "ü"]}})


def test_what_is_saved_comes_back(tmp_path):
    saved = some_checkpoint()
    loaded = load(save(tmp_path, 12, saved, keep=1))
    assert loaded.state == saved.state
    assert loaded.tensors.keys() == saved.tensors.keys()
    for group, tensors in saved.tensors.items():
        for name, tensor in tensors.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[group][name], tensor)


def test_the_newest_are_kept_and_found_by_number(tmp_path):
    assert latest(tmp_path) is None
    for step in (5, 90, 100, 110):
        save(tmp_path, step, some_checkpoint(step), keep=3)
    assert [path.name for path in committed(tmp_path)] == ["step-90", "step-100", "step-110"]
    assert latest(tmp_path) == tmp_path / "step-110"
    assert {path.name for path in tmp_path.iterdir()} == {"step-90", "step-100", "step-110"}


def test_only_whole_numbers_are_steps(tmp_path):
    save(tmp_path, 3, some_checkpoint(3), keep=9)
    for name in ("step-4.bak", "step-x", ".step-9.tmp", "step-"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == tmp_path / "step-3"


def test_manifest_lists_size_and_hash_of_every_other_file(tmp_path):
    path = save(tmp_path, 1, some_checkpoint(), keep=1)
    entries = json.loads((path / "manifest.json").read_text())["files"]
    assert entries.keys() == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, entry in entries.items():
        assert entry["bytes"] == (path / name).stat().st_size
        assert len(entry["sha256"]) == 64


@pytest.mark.parametrize(
    ("loaded", "complaint"),
    [
        ({"w": torch.zeros(2, 3)}, r"here: tensor v is missing"),
        ({"w": torch.zeros(2, 3), "v": torch.zeros(4), "z": torch.zeros(1)}, r"here: tensor z is unknown"),
        ({"w": torch.zeros(3, 2), "v": torch.zeros(4)}, r"here: tensor w is torch.float32 \(3, 2\).*\(2, 3\)"),
        ({"w": torch.zeros(2, 3, dtype=torch.float64), "v": torch.zeros(4)}, r"w is torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_copied(loaded, complaint):
    targets = {"w": torch.ones(2, 3), "v": torch.ones(4)}
    with pytest.raises(InputError, match=complaint):
        copy_into(targets, loaded, "here")
    assert all((tensor == 1).all() for tensor in targets.values())
