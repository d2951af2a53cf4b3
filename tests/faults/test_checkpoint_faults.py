"""Kills, full disks, flipped bytes and hostile files: the last committed checkpoint loads, or is refused by name."""

import contextlib
import json
import os
import pathlib
import shutil
import struct

import pytest
import torch
from damage import CHANGES, refused_once_changed, refused_with_any_byte_flipped

from benthic.errors import InputError
from benthic.train import checkpoint as module
from benthic.train.checkpoint import Checkpoint, CheckpointFailed, committed, latest, load, save


def numbered(step: int) -> Checkpoint:
    tensors = {"model": {"w": torch.full((5, 3), float(step))}, "optimizer": {"w.momentum": torch.full((5, 3), -1.0)}}
    return Checkpoint(tensors, {"step": step})


class Killed(BaseException):
    """Ends the process as far as the code under test can tell: nothing of it runs afterwards."""


class Failpoint:
    """Counts the operations that change the disk, and raises an error at the n-th, half way through a write."""

    def __init__(self, monkeypatch, at: int, error: BaseException) -> None:
        self.count, self.at, self.error = 0, at, error
        self._wrap(monkeypatch, os, "fsync")
        self._wrap(monkeypatch, os, "rename")
        self._wrap(monkeypatch, os, "replace")
        self._wrap(monkeypatch, os, "mkdir")
        self._wrap(monkeypatch, os, "unlink")
        self._wrap(monkeypatch, os, "rmdir")
        self._wrap(
            monkeypatch,
            pathlib.Path,
            "write_text",
            torn=lambda path, text, **_: path.write_bytes(text.encode()[: len(text) // 2]),
        )
        self._wrap(monkeypatch, module, "save_file", torn=lambda tensors, path: path.write_bytes(b"\x10\0\0"))

    def _wrap(self, monkeypatch, owner, name, torn=None) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                if torn:
                    torn(*args, **kwargs)
                raise self.error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)


def operations_of_a_save(tmp_path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path / "count"
        save(root, 1, numbered(1), keep=1)
        point = Failpoint(patch, -1, Killed())
        save(root, 2, numbered(2), keep=1)
    return point.count


def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    operations = operations_of_a_save(tmp_path)
    assert operations >= 12
    found = set()
    for at in range(1, operations + 1):
        root = tmp_path / f"kill-{at}"
        save(root, 1, numbered(1), keep=1)
        with pytest.MonkeyPatch.context() as patch:
            Failpoint(patch, at, Killed())
            with contextlib.suppress(Killed):
                save(root, 2, numbered(2), keep=1)
        newest = latest(root)
        loaded = load(newest)
        step = loaded.state["step"]
        assert newest.name == f"step-{step}"
        assert torch.equal(loaded.tensors["model"]["w"], torch.full((5, 3), float(step)))
        found.add(step)
        save(root, 3, numbered(3), keep=1)  # what the kill left behind does not stand in the way
        assert load(latest(root)).state["step"] == 3
        assert [path.name for path in root.iterdir()] == ["step-3"]
    assert found == {1, 2}


def test_an_error_in_a_save_is_reported_and_leaves_the_old_ones_alone(tmp_path):
    reports = []
    for at in range(1, operations_of_a_save(tmp_path) + 1):
        root = tmp_path / f"error-{at}"
        save(root, 1, numbered(1), keep=1)
        with pytest.MonkeyPatch.context() as patch:
            Failpoint(patch, at, OSError(28, "No space left on device"))
            try:
                save(root, 2, numbered(2), keep=1)
            except CheckpointFailed as error:
                reports.append(str(error))
        assert load(latest(root)).state["step"] in (1, 2)
    assert len(reports) >= 9
    assert all("step-2: not saved" in report and "No space left" in report for report in reports)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointFailed, match="step-1"):
        save(tmp_path / "file" / "pretrain", 1, numbered(1), keep=1)


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_refused_and_the_file_named(tmp_path, name):
    refused_with_any_byte_flipped(save(tmp_path, 1, numbered(1), keep=1), name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_truncated_or_missing_file_is_named(tmp_path, name, change):
    refused_once_changed(save(tmp_path, 1, numbered(1), keep=1), name, change)


def test_a_damaged_checkpoint_names_the_older_one(tmp_path):
    save(tmp_path, 1, numbered(1), keep=2)
    path = save(tmp_path, 2, numbered(2), keep=2)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"resume from step-1 instead, remove .*step-2"):
        load(latest(tmp_path))
    assert len(committed(tmp_path)) == 2


def rewrite_manifest(path, **changes) -> None:
    """As one who can also compute hashes would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": module.sha256(path / name)}
    manifest["files"].update(changes)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "model.pt", "optimizer.bin", "a/b.safetensors"])
def test_names_that_no_checkpoint_has_are_refused(tmp_path, name):
    path = save(tmp_path, 1, numbered(1), keep=1)
    rewrite_manifest(path, **{name: {"bytes": 0, "sha256": ""}})
    with pytest.raises(InputError, match=r"manifest.json: lists"):
        load(path)


def test_a_file_the_manifest_does_not_list_is_refused(tmp_path):
    path = save(tmp_path, 1, numbered(1), keep=1)
    (path / "extra.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"extra.safetensors: not listed"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_links_are_refused(tmp_path, name):
    path = save(tmp_path, 1, numbered(1), keep=1)
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: must be a plain file"):
        load(path)


def test_a_linked_checkpoint_is_refused(tmp_path):
    path = save(tmp_path, 1, numbered(1), keep=1)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="must be a directory, not a link"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 100 * 2**20) + b" " * 64,
        struct.pack("<Q", 2**63) + b"{}",
        b"\x80\x05cos\nsystem\n.",
        b"",
        b"PK",
    ],
)
def test_weights_that_are_no_safetensors_are_refused_even_if_hashed(tmp_path, content):
    path = save(tmp_path, 1, numbered(1), keep=1)
    (path / "model.safetensors").write_bytes(content)
    rewrite_manifest(path)
    with pytest.raises(InputError, match=r"model.safetensors"):
        load(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"nonsense", b"\xff\xfe", b" " * (17 * 2**20)])
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_json_that_is_too_deep_too_large_or_no_object_is_refused(tmp_path, name, content):
    path = save(tmp_path, 1, numbered(1), keep=1)
    (path / name).write_bytes(content)
    if name == "state.json":
        rewrite_manifest(path)
    with pytest.raises(InputError, match=name):
        load(path)
