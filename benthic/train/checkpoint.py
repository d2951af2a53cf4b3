"""Checkpoints that are whole or absent: a kill at any moment leaves the last committed one in place.

A checkpoint is a directory ``step-N`` of safetensors files, ``state.json``, and ``manifest.json`` with the size and
hash of each, written last. All of it is written into a hidden sibling, pushed to disk, and renamed: the rename is
the commit. Nothing is believed when read back, and nothing is ever unpickled.

Of a run in several processes the tensors are in parts (``benthic/train/parts.py``), which all of them write together
(``benthic/train/joint.py``). Either kind is read whole, or as much of it as a process holds.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benthic.errors import InputError, WorkFailed
from benthic.files import read_json_object, require_plain, sha256, sync, usual_mode
from benthic.parallel.local import local
from benthic.train.parts import HEADER_LIMIT, Keep, Wanted, as_read, describe_file, everything, part_name, read_parts

_STEP = re.compile(r"step-(\d{1,18})")
_FILE = re.compile(r"[a-z_]+\.safetensors|state\.json")


class CheckpointFailed(WorkFailed):
    """A checkpoint could not be written; those already there are intact."""


class Checkpoint(NamedTuple):
    """Named groups of named tensors (``model``, ``optimizer``, ...), and a JSON object with the ``step``."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(root: Path, step: int, checkpoint: Checkpoint, keep: int | None) -> Path:
    """Commit ``root/step-N`` and delete all but the newest ``keep``, or none. Raises CheckpointFailed."""
    target = root / f"step-{step}"
    temporary = root / f".{target.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        discard_leftovers(root)
        temporary.mkdir()
        _write(temporary, checkpoint)
        temporary.rename(target)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointFailed(f"{target}: not saved ({error}); earlier checkpoints are intact") from error
    # One too many is no reason to stop a run; the next save tries again.
    with suppress(OSError):
        for old in committed(root)[:-keep] if keep else []:
            discard(old)
    return target


def committed(root: Path) -> list[Path]:
    """All committed checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(root: Path) -> Path | None:
    """The newest committed checkpoint."""
    return next(reversed(committed(root)), None)


def reached(root: Path, stages: Sequence[str]) -> tuple[int, Path | None]:
    """The last of a run's stages, from 0, that has a checkpoint, and its newest one; the first stage where none has.

    ``root`` has a folder for each stage. Times do not count: a copied run has those of its copying.
    """
    for number in reversed(range(len(stages))):
        newest = latest(root / stages[number])
        if newest is not None:
            return number, newest
    return 0, None


def discard(directory: Path) -> None:
    """Delete a checkpoint, by a rename first, so that a kill half way leaves no partial one under its name."""
    doomed = directory.with_name(f".{directory.name}.tmp")
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def load(
    path: Path, groups: Collection[str] | None = None, wanted: Wanted = everything, keep: Keep = as_read
) -> Checkpoint:
    """Read a checkpoint after checking every byte that is read against its manifest.

    Args:
        path: the checkpoint's directory.
        groups: of tensors to read, as far as they are there; by default all.
        wanted: what of each tensor; by default all.
        keep: what stays of each, before the next is read.

    Raises:
        InputError: a file is missing, damaged, or not what a checkpoint may hold; the message names it, and an
            older checkpoint if there is one.
    """
    try:
        return _load(path, groups, wanted, keep)
    except InputError as error:
        older = [other for other in committed(path.parent) if _step(other) < _step(path)]
        advice = f"; to resume from {older[-1].name} instead, remove {path}" if older else ""
        raise InputError(f"{error}{advice}") from error


def _write(directory: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in checkpoint.tensors.items():
        path = directory / f"{name}.safetensors"
        with usual_mode(path):
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    (directory / "state.json").write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
    files = sorted(directory.iterdir())
    entries = {file.name: describe_file(file) for file in files}
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    for file in (*files, manifest, directory):
        sync(file)


def discard_leftovers(root: Path) -> None:
    """Delete what a killed save or deletion left behind."""
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def _load(path: Path, groups: Collection[str] | None, wanted: Wanted, keep: Keep) -> Checkpoint:
    if path.is_symlink():
        raise InputError(f"{path}: must be a directory, not a link")
    entries, parts = _manifest(path / "manifest.json")

    def check(file: Path) -> None:
        _check(file, entries[file.name])

    check(path / "state.json")
    state = read_json_object(path / "state.json")
    if state.get("step") != _step(path):
        raise InputError(f"{path / 'state.json'}: is of step {state.get('step')!r}, not of {path.name}")
    if parts:
        return Checkpoint(read_parts(path, parts, check, groups, wanted, keep), state)
    files = [path / name for name in sorted(entries) if name != "state.json"]
    files = [file for file in files if groups is None or file.stem in groups]
    for file in files:
        check(file)
    return Checkpoint({file.stem: _read_tensors(file, wanted, keep) for file in files}, state)


def _manifest(path: Path) -> tuple[dict[str, Any], int]:
    """What it says of each file, and in how many parts the tensors are; 0 of a single process's."""
    content = read_json_object(path)
    entries, parts = content.get("files"), content.get("parts", 0)
    if not isinstance(entries, dict) or "state.json" not in entries:
        raise InputError(f"{path}: lists no checkpoint's files")
    if not isinstance(parts, int) or not 0 <= parts < len(entries):
        raise InputError(f"{path}: parts={parts!r:.80} must be the number of part-*.json it lists")
    described = {"state.json", *map(part_name, range(parts))}
    for name in entries:
        if not (_FILE.fullmatch(name) if parts == 0 else name in described):
            raise InputError(f"{path}: lists {name!r}; a checkpoint holds .safetensors files and state.json")
    allowed = {*entries, path.name}
    for file in path.parent.iterdir():
        if file.name not in allowed and not (parts and file.suffix == ".safetensors"):
            raise InputError(f"{file}: not listed in {path.name}")
    return entries, parts


def _check(path: Path, entry: Any) -> None:
    size = require_plain(path)
    if not isinstance(entry, dict) or size != entry.get("bytes"):
        raise InputError(f"{path}: damaged, its {size} bytes are not those of its manifest")
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER_LIMIT:
            raise InputError(f"{path}: header of {header} bytes; at most {HEADER_LIMIT} are read")
    if sha256(path) != entry.get("sha256"):
        raise InputError(f"{path}: damaged, its content does not match its manifest")


def _read_tensors(path: Path, wanted: Wanted, keep: Keep) -> dict[str, Tensor]:
    try:
        if wanted is everything:
            return {name: keep(path.stem, name, tensor) for name, tensor in load_file(path).items()}
        with safe_open(path, framework="pt") as file:
            return {name: keep(path.stem, name, tensor) for name, tensor in _wanted_of(path.stem, file, wanted)}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error


def _wanted_of(group: str, file: Any, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    for name in file.keys():  # noqa: SIM118 - not a mapping
        shape = tuple(file.get_slice(name).get_shape())
        box = wanted(group, name, shape)
        if box is not None:
            yield name, file.get_tensor(name) if box.size == shape else file.get_slice(name)[box.slices]


def _step(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else 0


def copy_into(targets: Mapping[str, Tensor], loaded: Mapping[str, Tensor], source: str) -> None:
    """Copy loaded tensors into those of the same name. Raises InputError if names, shapes or types differ.

    Into a tensor that is spread over ranks goes what this rank holds of it. ``source`` is what the message names.
    """
    for name in sorted(targets.keys() ^ loaded.keys()):
        raise InputError(f"{source}: tensor {name} is {'missing' if name in targets else 'unknown to this model'}")
    for name, target in targets.items():
        found, target = loaded[name], local(target)
        if found.shape != target.shape or found.dtype != target.dtype:
            raise InputError(
                f"{source}: tensor {name} is {found.dtype} {tuple(found.shape)}, "
                f"this model's is {target.dtype} {tuple(target.shape)}"
            )
    for name, target in targets.items():
        local(target.detach()).copy_(loaded[name])
