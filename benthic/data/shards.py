"""A split's tokens on disk: raw little-endian integers in bounded files, and where its documents end.

Nothing is read before its size and hash have been checked against the manifest.
"""

from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from benthic.data.manifest import DataFile, Manifest, Split, SplitManifest
from benthic.errors import InputError
from benthic.files import require_plain, sha256, sync

SHARD_TOKENS = 64 << 20
_REPAIR = "to prepare it again, give `benthic data` the same recipe or files and --out"
Tokens = NDArray[np.int64]


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Appends the documents of one split to shards of at most ``SHARD_TOKENS`` tokens; ``close`` describes them."""

    def __init__(self, directory: Path, split: Split, dtype: str) -> None:
        self._directory, self._split = directory, split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards: list[DataFile] = []
        self._ends = array("Q")
        self._tokens = self._bytes = self._in_shard = 0
        self._file: BinaryIO | None = None

    def append(self, ids: list[int], text_bytes: int) -> None:
        """Add one document, ``text_bytes`` the UTF-8 size of its plain text."""
        tokens = np.asarray(ids, dtype=self._dtype)
        self._tokens += len(tokens)
        self._bytes += text_bytes
        self._ends.append(self._tokens)
        while len(tokens):
            if self._file is None:
                self._file = (self._directory / self._shard_name()).open("wb")
            now, tokens = np.split(tokens, [SHARD_TOKENS - self._in_shard])
            self._file.write(now.tobytes())
            self._in_shard += len(now)
            if self._in_shard == SHARD_TOKENS:
                self._finish_shard()

    def close(self) -> SplitManifest:
        """Flush everything to the disk; no document can be added after it."""
        if self._file is not None:
            self._finish_shard()
        ends = np.asarray(self._ends, dtype="<u8")
        name = f"{self._split}-boundaries.bin"
        ends.tofile(self._directory / name)
        return SplitManifest(
            documents=len(ends),
            tokens=self._tokens,
            bytes=self._bytes,
            shards=tuple(self._shards),
            boundaries=_describe(self._directory / name, len(ends)),
        )

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.bin"

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        self._shards.append(_describe(self._directory / self._shard_name(), self._in_shard))
        self._file, self._in_shard = None, 0


def _describe(path: Path, items: int) -> DataFile:
    sync(path)
    return DataFile(name=path.name, items=items, sha256=sha256(path))


class TokenStore:
    """One split, memory-mapped and verified.

    ``document_ends_D`` are the positions one past each of the D documents in the split's stream of ``tokens`` tokens.
    Raises ``InputError`` that names the file which is missing, truncated, altered or holds ids out of the vocabulary.
    """

    def __init__(self, directory: str | Path, split: Split) -> None:
        directory = Path(directory)
        self.manifest = Manifest.load(directory)
        described: SplitManifest = getattr(self.manifest, split)
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        if not described.shards:
            raise InputError(
                f"{directory}: the manifest lists no {split} shards; delete {directory} and prepare the data again"
            )
        self._shards = [_map(directory / shard.name, shard, dtype) for shard in described.shards]
        for shard, tokens in zip(described.shards, self._shards, strict=True):
            if tokens.max() >= self.manifest.vocab_size:
                raise InputError(
                    f"{directory / shard.name}: token id {tokens.max()} is out of the vocabulary of "
                    f"{self.manifest.vocab_size}"
                )
        self._shard_ends = np.cumsum([len(tokens) for tokens in self._shards])
        boundaries = described.boundaries
        self.document_ends_D = _map(directory / boundaries.name, boundaries, np.dtype("<u8")).astype(np.int64)
        self.tokens = described.tokens
        ends_D = self.document_ends_D
        if not (ends_D[0] > 0 and (np.diff(ends_D) > 0).all() and ends_D[-1] == self.tokens == self._shard_ends[-1]):
            raise InputError(f"{directory}: the {split} shards and boundaries disagree with the manifest")

    def take(self, positions: Tokens) -> Tokens:
        """Token ids at ``positions`` (any shape) of the split's stream."""
        which = np.searchsorted(self._shard_ends, positions, side="right")
        ids = np.empty(positions.shape, dtype=np.int64)
        for shard in np.unique(which):
            inside = which == shard
            start = self._shard_ends[shard] - len(self._shards[shard])
            ids[inside] = self._shards[shard][positions[inside] - start]
        return ids


def _map(path: Path, described: DataFile, dtype: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    expected = described.items * dtype.itemsize
    if Path(described.name).name != described.name:
        raise InputError(f"{path}: a shard must lie beside its manifest")
    if (size := require_plain(path)) != expected or not size:
        raise InputError(f"{path}: {size} bytes, but the manifest says {expected}; {_REPAIR}")
    if sha256(path) != described.sha256:
        raise InputError(f"{path}: does not match the hash in the manifest; {_REPAIR}")
    return np.memmap(path, dtype=dtype, mode="r")
