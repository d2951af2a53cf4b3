"""A checkpoint in parts, one of each rank that took part: what a rank writes of it, and what any rank reads.

A part is a safetensors file for each group of tensors, with the pieces that the rank owns, and ``part-R.json``, which
says where in the whole each lies, and has the SHA-256 of each file's blocks. By blocks, so that a rank of another
layout reads, and checks, no more than what it needs. Every piece is in one part alone.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from benthic.errors import InputError
from benthic.files import read_json_object, require_plain, sha256, sync, usual_mode
from benthic.parallel.pieces import Box, Extent, Piece, tile

BLOCK_BYTES = 8 * 2**20
HEADER_LIMIT = 16 * 2**20
_FILE = re.compile(r"([a-z_]+)-(\d{5})\.safetensors")

Wanted = Callable[[str, str, Extent], Box | None]
"""What is to be read of a tensor, by group, name and whole shape; nothing if it is None."""
Keep = Callable[[str, str, Tensor], Tensor]
"""What stays of a tensor that was read, by group and name, before the next is: itself, or what it was copied into."""
Owned = Mapping[str, Mapping[str, tuple[Piece, Tensor]]]
"""By group and name, what a rank writes."""


def everything(group: str, name: str, shape: Extent) -> Box:
    """Wants all of every tensor."""
    return Box((0,) * len(shape), shape)


def as_read(group: str, name: str, tensor: Tensor) -> Tensor:
    """Keeps every tensor, which may be a view of its file."""
    return tensor


def part_name(rank: int) -> str:
    """Of the file that describes a rank's part."""
    return f"part-{rank:05d}.json"


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_part(directory: Path, rank: int, owned: Owned) -> dict[str, Any]:
    """Write a rank's files and push them to the disk; what the manifest is to say of ``part-R.json``.

    Raises OSError or SafetensorError.
    """
    files: dict[str, Any] = {}
    places: dict[str, Any] = {}
    for group, tensors in owned.items():
        path = directory / f"{group}-{rank:05d}.safetensors"
        with usual_mode(path):
            save_file({name: tensor.contiguous() for name, (_, tensor) in tensors.items()}, path)
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "blocks": list(_hashes(path))}
        places[group] = {
            name: {"shape": piece.shape, "offset": piece.offset, "size": piece.size}
            for name, (piece, _) in tensors.items()
        }
    path = directory / part_name(rank)
    path.write_text(json.dumps({"block_bytes": BLOCK_BYTES, "files": files, "tensors": places}), encoding="utf-8")
    sync(path)
    return describe_file(path)


def _hashes(path: Path) -> Iterable[str]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield hashlib.sha256(block).hexdigest()


def read_parts(
    directory: Path,
    parts: int,
    check: Callable[[Path], None],
    groups: Iterable[str] | None,
    wanted: Wanted,
    keep: Keep = as_read,
) -> dict[str, dict[str, Tensor]]:
    """What is wanted of the tensors of these groups, by default all, by group and name.

    Args:
        directory: of the checkpoint.
        parts: how many there are.
        check: raises InputError unless a file is what the manifest says.
        groups: of tensors, as far as they are there.
        wanted: by which only blocks that are needed are read.
        keep: called with each tensor in turn.

    Raises:
        InputError: a file is missing, damaged, or not what a part may hold, or the pieces do not make up the whole.
    """
    found: dict[str, dict[str, list[_Stored]]] = {}
    listed: set[str] = set()
    for rank in range(parts):
        path = directory / part_name(rank)
        check(path)
        part = _Part(path, rank)
        listed |= part.files
        for group, tensors in part.tensors.items():
            pieces = found.setdefault(group, defaultdict(list))
            for name, stored in tensors.items():
                pieces[name].append(stored)
    unlisted = {path.name for path in directory.glob("*.safetensors")} - listed
    if unlisted:
        raise InputError(f"{directory / min(unlisted)}: not listed in any part-*.json")
    return {
        group: {name: keep(group, name, tensor) for name, tensor in _assemble_all(directory, group, tensors, wanted)}
        for group, tensors in found.items()
        if groups is None or group in groups
    }


class _File:
    """One file of a part, of which a block is checked before it is used for the first time."""

    def __init__(self, path: Path, entry: Any, block_bytes: int) -> None:
        self.path, self._block_bytes = path, block_bytes
        match entry:
            case {"bytes": int(size), "blocks": [*blocks]}:
                self._blocks = blocks
            case _:
                raise InputError(f"{path}: has no size and hashes in its part's description")
        if (found := require_plain(path)) != size:
            raise InputError(f"{path}: damaged, its {found} bytes are not those of its part's description")
        self._checked: set[int] = set()

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and what the header says."""
        self.check(0, 8)
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > HEADER_LIMIT:
                raise InputError(f"{self.path}: header of {length} bytes; at most {HEADER_LIMIT} are read")
            self.check(8, 8 + length)
            try:
                header = json.loads(file.read(length))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}: not a safetensors file ({error})") from error
        return 8 + length, header if isinstance(header, dict) else {}

    def check(self, start: int, stop: int) -> None:
        """Raise InputError unless the blocks with these bytes are what they were when they were written."""
        blocks = set(range(start // self._block_bytes, -(-stop // self._block_bytes))) - self._checked
        with self.path.open("rb") as file:
            for number in sorted(blocks):
                file.seek(number * self._block_bytes)
                found = hashlib.sha256(file.read(self._block_bytes)).hexdigest()
                if number >= len(self._blocks) or found != self._blocks[number]:
                    raise InputError(f"{self.path}: damaged, its content does not match its part's description")
        self._checked |= blocks

    def read(self, name: str, size: Extent, box: Box) -> Tensor:
        """A box of the piece that has this name and size, after checking the rows that it is in."""
        start, stop = self._place_of(name, size)
        if size:
            row = (stop - start) // max(1, size[0])
            start, stop = start + row * box.offset[0], start + row * (box.offset[0] + box.size[0])
        self.check(start, stop)
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_slice(name)[box.slices] if box.size != size else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: not a safetensors file ({error})") from error
        return tensor

    def _place_of(self, name: str, size: Extent) -> tuple[int, int]:
        """Where a piece's bytes begin and end."""
        begin, header = self._header
        match header.get(name):
            case {"shape": [*shape], "data_offsets": [int(start), int(stop)]} if tuple(shape) == size:
                return begin + start, begin + stop
        raise InputError(f"{self.path}: has no tensor {name} of shape {size}")


class _Stored(NamedTuple):
    """A piece of a tensor in a file."""

    file: _File
    shape: Extent
    """Of the whole."""
    box: Box

    def read(self, name: str, box: Box) -> Tensor:
        """What it has of this box in the whole."""
        return self.file.read(name, self.box.size, box.within(self.box))


class _Part:
    """What ``part-R.json`` says: the part's files, and by group and name the pieces in them."""

    def __init__(self, path: Path, rank: int) -> None:
        content = read_json_object(path)
        block_bytes = content.get("block_bytes")
        if not isinstance(block_bytes, int) or not 0 < block_bytes <= 2**30:
            raise InputError(f"{path}: block_bytes={block_bytes!r:.80} must be a number of bytes")
        files: dict[str, _File] = {}
        for name, entry in _object(content, "files", path).items():
            match = _FILE.fullmatch(name)
            if not match or int(match[2]) != rank:
                raise InputError(f"{path}: lists {name!r:.80}; a part holds .safetensors files with its number")
            files[match[1]] = _File(path.with_name(name), entry, block_bytes)
        self.files = {file.path.name for file in files.values()}
        self.tensors: dict[str, dict[str, _Stored]] = {}
        places = _object(content, "tensors", path)
        for group in places:
            if group not in files:
                raise InputError(f"{path}: has no file of {group!r:.80}")
            self.tensors[group] = {
                name: _stored(files[group], name, place) for name, place in _object(places, group, path).items()
            }


def _stored(file: _File, name: str, place: Any) -> _Stored:
    match place:
        case {"shape": [*shape], "offset": [*offset], "size": [*size]} if len(shape) == len(offset) == len(
            size
        ) and all(isinstance(number, int) and number >= 0 for number in (*shape, *offset, *size)):
            return _Stored(file, tuple(shape), Box(tuple(offset), tuple(size)))
    raise InputError(f"{file.path}: tensor {name} has no place in its part's description")


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise InputError(f"{path}: {key} must be a JSON object")
    return found


def _assemble_all(
    directory: Path, group: str, tensors: Mapping[str, list[_Stored]], wanted: Wanted
) -> Iterable[tuple[str, Tensor]]:
    for name, pieces in tensors.items():
        tensor = _assemble(directory, group, name, pieces, wanted)
        if tensor is not None:
            yield name, tensor


def _assemble(directory: Path, group: str, name: str, pieces: list[_Stored], wanted: Wanted) -> Tensor | None:
    """What is wanted of one tensor."""
    shape = pieces[0].shape
    if any(piece.shape != shape for piece in pieces) or not tile(shape, [piece.box for piece in pieces]):
        raise InputError(f"{directory}: the parts of {group} tensor {name} do not make up the whole")
    box = wanted(group, name, shape)
    if box is None:
        return None
    needed = [(piece, common) for piece in pieces if (common := piece.box.overlap(box)).numel]
    read = [(common, piece.read(name, common)) for piece, common in needed]
    if not read:
        return pieces[0].read(name, pieces[0].box._replace(size=(0,) * len(shape))).new_empty(box.size)
    if len(read) == 1:
        return read[0][1]
    if len({tensor.dtype for _, tensor in read}) > 1:
        raise InputError(f"{directory}: the parts of {group} tensor {name} are of several types")
    result = torch.empty(box.size, dtype=read[0][1].dtype)
    for common, tensor in read:
        result[common.within(box).slices] = tensor
    return result
