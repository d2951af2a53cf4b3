"""Files that survive a kill or a power cut, and are not trusted when read back."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benthic.errors import InputError, WorkFailed

JSON_LIMIT = 64 * 2**20
"""Bytes of the largest JSON file that is read."""

_WRONG_PATH = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip


def sync(path: Path) -> None:
    """Push a file's or a directory's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart after a kill, finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """What is written to ``path`` inside can be read by whom the umask allows, whatever its writer thinks of it.

    The safetensors library makes files that nobody but their owner can read.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_plain(path: Path) -> int:
    """Size of a file in bytes; InputError unless it is there and is a plain file, not a link or device."""
    try:
        info = path.lstat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{path}: must be a plain file, not a link or a device")
    return info.st_size


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError that names the file if it is none, or larger than 64 MiB."""
    if (size := require_plain(path)) > JSON_LIMIT:
        raise InputError(f"{path}: {size} bytes of JSON; at most {JSON_LIMIT} are read")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def cannot_write(path: Path, error: Exception) -> InputError | WorkFailed:
    """What to raise when writing below ``path`` failed: the user's mistake, or such as a full disk."""
    kind = InputError if isinstance(error, OSError) and error.errno in _WRONG_PATH else WorkFailed
    return kind(f"{path}: cannot be written: {error}")
