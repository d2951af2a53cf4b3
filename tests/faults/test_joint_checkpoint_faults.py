"""Kills, full disks and flipped bytes while several ranks save: all agree, and the checkpoint before is intact."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import threading

import pytest
import torch
from boards import free_port, on_ranks
from damage import CHANGES, refused_once_changed, refused_with_any_byte_flipped

from benthic.errors import InputError
from benthic.parallel.pieces import Cut, cut, whole
from benthic.train import parts
from benthic.train.checkpoint import Checkpoint, CheckpointFailed, committed, latest, load
from benthic.train.joint import JointSaves
from benthic.train.shares import Shares

WORLD = 3
HOLDINGS = [{"w": cut(whole("w", (6, 3)), [Cut(0, WORLD, rank)]), "b": whole("b", (2,))} for rank in range(WORLD)]


def numbered(step: int) -> Checkpoint:
    tensors = {"w": torch.full((6, 3), float(step)), "b": torch.full((2,), float(step))}
    return Checkpoint({"model": tensors, "optimizer": {"w.momentum": torch.full((6, 3), -float(step))}}, {"step": step})


def save_all(root, step: int, *, timeout_seconds: float = 10, keep: int | None = 1) -> list:
    """What each rank returned or raised."""

    def on_rank(board):
        shares, state = Shares(board.rank, HOLDINGS), numbered(step)
        mine = {
            group: {
                name: tensor[shares.wanted(group, name, tuple(tensor.shape)).slices] for name, tensor in named.items()
            }
            for group, named in state.tensors.items()
        }
        return JointSaves(board).save(root, step, shares.owned(Checkpoint(mine, state.state)), state.state, keep)

    return on_ranks(WORLD, on_rank, timeout_seconds)


class Killed(BaseException):
    """Ends a rank as far as the code under test can tell: nothing of it runs afterwards."""


class Failpoint:
    """Counts a rank's operations that change the disk, and raises an error at the n-th, half way through a write."""

    def __init__(self, monkeypatch, rank: int, at: int, error: BaseException) -> None:
        self.rank, self.count, self.at, self.error = rank, 0, at, error
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            self._wrap(monkeypatch, os, name)
        self._wrap(
            monkeypatch,
            pathlib.Path,
            "write_text",
            torn=lambda path, text, **_: path.write_bytes(text.encode()[: len(text) // 2]),
        )
        self._wrap(monkeypatch, parts, "save_file", torn=lambda tensors, path: path.write_bytes(b"\x10\0\0"))

    def _wrap(self, monkeypatch, owner, name, torn=None) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if threading.current_thread().name == f"rank-{self.rank}":
                self.count += 1
                if self.count == self.at:
                    if torn:
                        torn(*args, **kwargs)
                    raise self.error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)


def operations_of_a_save(tmp_path, rank: int, keep: int | None = 1) -> int:
    with pytest.MonkeyPatch.context() as patch:
        save_all(tmp_path / "count", 1)
        point = Failpoint(patch, rank, -1, Killed())
        save_all(tmp_path / "count", 2, keep=keep)
    return point.count


def holds(path) -> int:
    """The step that a whole checkpoint is of."""
    loaded = load(path)
    step = loaded.state["step"]
    assert path.name == f"step-{step}"
    assert all(
        torch.equal(loaded.tensors["model"][name], tensor) for name, tensor in numbered(step).tensors["model"].items()
    )
    return step


@pytest.mark.parametrize("rank", [0, WORLD - 1])
def test_a_kill_of_one_rank_at_any_operation_leaves_a_whole_checkpoint(tmp_path, rank):
    operations = operations_of_a_save(tmp_path, rank)
    assert operations >= (10 if rank == 0 else 6)
    found = set()
    for at in range(1, operations + 1):
        root = tmp_path / f"kill-{at}"
        save_all(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            Failpoint(patch, rank, at, Killed())
            ends = save_all(root, 2, timeout_seconds=0.3)
        assert isinstance(ends[rank], Killed)
        found.add(holds(latest(root)))
        assert save_all(root, 3) == [root / "step-3"] * WORLD  # what the kill left behind does not stand in the way
        assert [path.name for path in root.iterdir()] == ["step-3"]
        assert holds(latest(root)) == 3
    assert found == ({1, 2} if rank == 0 else {1})


@pytest.mark.parametrize("rank", range(WORLD))
def test_an_error_of_one_rank_is_reported_by_every_rank(tmp_path, rank):
    operations = operations_of_a_save(tmp_path, rank, keep=None)
    reported = 0
    for at in range(1, operations + 1):
        root = tmp_path / f"error-{at}"
        save_all(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            Failpoint(patch, rank, at, OSError(28, "No space left on device"))
            ends = save_all(root, 2)
        failed = [end for end in ends if isinstance(end, CheckpointFailed)]
        assert len(failed) in (0, WORLD), ends
        assert holds(latest(root)) in (1, 2)
        if failed:
            reported += 1
            assert len({str(end) for end in ends}) == 1
            assert f"step-2: not saved (rank {rank}: " in str(ends[0])
            assert "No space left on device" in str(ends[0])
            assert "earlier checkpoints are intact" in str(ends[0])
    # The first operation of rank 0 makes a directory that is there, and may fail.
    assert reported == operations - (rank == 0)


def test_a_rank_that_says_nothing_is_named(tmp_path):
    def on_rank(board):
        if board.rank == 1:
            return None
        return JointSaves(board).save(tmp_path, 1, {}, {"step": 1}, None)

    ends = on_ranks(3, on_rank, 0.5)
    assert all(isinstance(ends[rank], CheckpointFailed) for rank in (0, 2))
    assert "nothing heard of 1/part-1" in str(ends[0])
    assert not committed(tmp_path)


def test_ranks_that_do_not_see_one_directory_are_told(tmp_path):
    def on_rank(board):
        root = tmp_path / ("here" if board.rank == 0 else "there")
        (tmp_path / "there" / ".step-1.tmp").mkdir(parents=True, exist_ok=True)
        return JointSaves(board).save(root, 1, {}, {"step": 1}, None)

    ends = on_ranks(2, on_rank)
    assert all("rank 1 has written where rank 0 does not see it" in str(end) for end in ends)


REAL = """
import resource, signal, sys
import torch
import torch.distributed as dist
from pathlib import Path
from benthic.parallel.board import Board
from benthic.parallel.pieces import Cut, cut, whole
from benthic.train.checkpoint import Checkpoint
from benthic.train.joint import JointSaves
from benthic.train.shares import Shares

rank, port, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, wait_for_workers=False)
board = Board(store, rank, 2, timeout_seconds=30).another("save")
if rank == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), -1))
holdings = [{"w": cut(whole("w", (2048, 64)), [Cut(0, 2, r)])} for r in range(2)]
tensors = {"model": {"w": torch.zeros(1024, 64)}}
try:
    JointSaves(board).save(root, 1, Shares(rank, holdings).owned(Checkpoint(tensors, {})), {"step": 1}, None)
except Exception as error:
    print(type(error).__name__, error)
store.set(f"done-{rank}", "")
store.wait(["done-0", "done-1"])
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_a_real_write_error_of_one_process_is_reported_by_both(tmp_path):
    """The second process may write files of so many bytes only; what the system then says reaches the first."""
    for limit, saved in ((100_000, False), (2**20, True)):
        root, port = tmp_path / str(limit), free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", REAL, str(rank), str(port), str(root), str(limit)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
        assert len(committed(root)) == saved
        assert [("CheckpointFailed" in one and "not saved (rank 1:" in one) for one in said] == [not saved] * 2, said


FILES = ("model-00001.safetensors", "optimizer-00000.safetensors", "state.json", "manifest.json", "part-00002.json")


@pytest.fixture
def saved(tmp_path):
    save_all(tmp_path, 1)
    return tmp_path / "step-1"


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_refused_and_the_file_named(saved, name):
    refused_with_any_byte_flipped(saved, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_truncated_or_missing_file_is_named(saved, name, change):
    refused_once_changed(saved, name, change)


def rewrite(path, change) -> None:
    """Change a part's description as one who can also compute hashes would."""
    part = json.loads((path / "part-00000.json").read_text())
    change(part)
    (path / "part-00000.json").write_text(json.dumps(part))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["part-00000.json"] = parts.describe_file(path / "part-00000.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "model.pt", "model-00001.safetensors", "a/model-00000.safetensors"]
)
def test_names_that_no_part_has_are_refused(saved, name):
    rewrite(saved, lambda part: part["files"].update({name: {"bytes": 0, "blocks": []}}))
    with pytest.raises(InputError, match=r"part-00000.json: lists"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.update(block_bytes=0),
        lambda part: part.update(block_bytes=2**40),
        lambda part: part.update(files=[]),
        lambda part: part.update(tensors=7),
        lambda part: part["tensors"].update(other={"w": {}}),
        lambda part: part["tensors"]["model"].update(x={"shape": [1], "offset": [0], "size": [1]}),
        lambda part: part["tensors"]["model"]["w"].update(size=[2]),
        lambda part: part["tensors"]["model"]["w"].update(size=[3, 3]),
        lambda part: part["tensors"]["model"]["w"].update(offset=[-1, 0]),
        lambda part: part["tensors"]["model"]["w"].update(shape=["6", 3]),
        lambda part: part["files"]["model-00000.safetensors"].update(blocks=[]),
        lambda part: part["files"]["model-00000.safetensors"].pop("bytes"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(saved, change):
    rewrite(saved, change)
    with pytest.raises(InputError, match=r"part-00000.json|model-00000.safetensors|step-1: the parts of model tensor"):
        load(saved)


@pytest.mark.parametrize("value", [-1, 4, "3", 10**9, None])
def test_a_wrong_number_of_parts_is_refused(saved, value):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"parts": value}))
    with pytest.raises(InputError, match=r"manifest.json: "):
        load(saved)


@pytest.mark.parametrize("name", FILES)
def test_links_are_refused(saved, tmp_path, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: must be a plain file"):
        load(saved)


@pytest.mark.parametrize("name", ["extra-00000.safetensors", "extra.txt"])
def test_a_file_that_is_not_listed_is_refused(saved, name):
    (saved / name).write_bytes(b"")
    with pytest.raises(InputError, match=rf"{name}: not listed"):
        load(saved)
