"""Reading a folder of safetensors that somebody else wrote, so that a damaged or hostile one is refused by name.

Everything that can be known without reading weights is checked first: the index stays inside the folder, every
header is whole and of bounded size, every tensor is there once and of the right shape. Nothing is unpickled.
"""

import json
import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from benthic.errors import InputError
from benthic.files import read_json_object, require_plain
from benthic.precision.blocks import block_grid, dequantise_blocks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
HEADER_LIMIT = 64 * 2**20
"""Bytes of the longest header that is read; a hundred thousand names need about 10 MB."""
FP8_DTYPE = "F8_E4M3"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, FP8_DTYPE: 1}
SCALE_SUFFIX = "_scale_inv"


class StoredTensor(NamedTuple):
    """What a header says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder by their published names, FP8 blocks dequantised as they are read."""

    def __init__(self, folder: Path, *, fp8: bool = False) -> None:
        """Reads and checks index and headers; with ``fp8``, weights may be E4M3 blocks with scales.

        Raises:
            InputError: no safetensors here, or a broken index, shard or header; the file is named.
        """
        self.folder = folder
        self.stored = _read_headers(folder)
        self.scales = {f"{name}{SCALE_SUFFIX}" for name in self.stored} & self.stored.keys() if fp8 else set()
        self._file: Path | None = None
        self._reader: Any = None
        for name in sorted(self.names):
            self._check_dtype(name)

    @property
    def names(self) -> set[str]:
        """Names of all weights; scales of FP8 blocks belong to their weights and are not among them."""
        return self.stored.keys() - self.scales

    def check_shape(self, name: str, shape: Iterable[int]) -> None:
        """Raises InputError unless the tensor has this shape."""
        found, expected = self.stored[name].shape, tuple(shape)
        if found != expected:
            raise InputError(f"{self.stored[name].file}: {name} has shape {list(found)}: must be {list(expected)}")

    def read(self, name: str) -> Tensor:
        """One weight, in the dtype it is stored in, or in fp32 if it is stored in FP8 blocks."""
        weight = self._tensor(name)
        if name + SCALE_SUFFIX not in self.scales:
            return weight
        return dequantise_blocks(weight, self._tensor(name + SCALE_SUFFIX))

    def _tensor(self, name: str) -> Tensor:
        file = self.stored[name].file
        try:
            if file != self._file:
                self._reader, self._file = safe_open(file, framework="pt"), file
            tensor: Tensor = self._reader.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: {name} cannot be read: {error}") from error
        return tensor

    def _check_dtype(self, name: str) -> None:
        tensor, scale = self.stored[name], name + SCALE_SUFFIX
        if tensor.dtype not in ITEM_BYTES:
            raise InputError(f"{tensor.file}: {name} has dtype {tensor.dtype}: must be one of {', '.join(ITEM_BYTES)}")
        if (tensor.dtype == FP8_DTYPE) != (scale in self.scales):
            raise InputError(
                f"{tensor.file}: {name} is {tensor.dtype}: FP8 weights, and no others, come with a tensor "
                f"{scale} and a quantization_config"
            )
        if scale in self.scales:
            if len(tensor.shape) != 2:
                raise InputError(f"{tensor.file}: {name} has shape {list(tensor.shape)}: only matrices can be FP8")
            self.check_shape(scale, block_grid(tensor.shape))
            if self.stored[scale].dtype != "F32":
                file, dtype, _ = self.stored[scale]
                raise InputError(f"{file}: {scale} has dtype {dtype}: must be F32")


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of a folder, refused if the name or a link leads out of it.

    The Hugging Face cache links its ``snapshots/REVISION`` folders into ``blobs`` beside ``snapshots``, so for one
    of these the whole entry of the cache counts as inside.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    file = folder / name
    if Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise InputError(f"{folder}: file name {name!r}: must be a plain name within the folder")
    try:
        target = file.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if not target.is_relative_to(root):
        raise InputError(f"{file}: a link that leads out of its folder")
    return file


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    if not inside(folder, INDEX).exists():
        return _read_header(inside(folder, _only_file(folder)))
    weight_map = read_json_object((folder / INDEX).resolve()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{folder / INDEX}: weight_map must be an object of tensor names and their files")
    headers = {name: _read_header(inside(folder, name)) for name in dict.fromkeys(weight_map.values())}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise InputError(f"{folder / file}: has no tensor {name}, which {INDEX} places there")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _only_file(folder: Path) -> str:
    if (folder / SINGLE).exists():
        return SINGLE
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: pickled weights are never read, for loading them can run any code; "
            "convert them to safetensors"
        )
    raise InputError(f"{folder}: holds neither {INDEX} nor {SINGLE}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes of a safetensors file whose data is exactly as long as its header says."""
    size = require_plain(file.resolve())
    text = _header_text(file)
    try:
        header = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: header is not a JSON object: damaged, or not safetensors") from error
    header.pop("__metadata__", None)
    data = max((_check_extent(name, entry, file) for name, entry in header.items()), default=0)
    if 8 + len(text) + data != size:
        raise InputError(f"{file}: {size} bytes where its header asks for {8 + len(text) + data}: truncated or damaged")
    return {name: StoredTensor(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _header_text(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= HEADER_LIMIT else b""
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if length > HEADER_LIMIT:
        raise InputError(f"{file}: header of {length} bytes: must be at most {HEADER_LIMIT}; is this safetensors?")
    return text


def _check_extent(name: str, entry: Any, file: Path) -> int:
    """Where a tensor's data ends; its bytes must be as many as dtype and shape say."""
    try:
        start, end = map(operator.index, entry["data_offsets"])
        shape = list(map(operator.index, entry["shape"]))
        size = math.prod(shape) * ITEM_BYTES.get(entry["dtype"], 0)
        negative = min(start, *shape, 0) < 0
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: {name}: malformed header entry") from error
    if negative or (entry["dtype"] in ITEM_BYTES and end - start != size):
        raise InputError(f"{file}: {name}: {end - start} bytes for shape {shape} of {entry['dtype']}")
    return end
