"""One process at a time on a directory: two that write the same run would mix their checkpoints and metrics."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from benthic.errors import InputError
from benthic.files import cannot_write

if sys.platform != "win32":
    import fcntl

FILE_NAME = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, making it if it is not there; afterwards it is gone again if nothing came to be in it.

    The system releases the lock when the process ends, however it ends.

    Raises:
        InputError: another process holds it, or it cannot be written.
        WorkFailed: the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _open_locked(directory / FILE_NAME)
    except OSError as error:
        raise cannot_write(directory, error) from error
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # gone with the directory, or the directory not empty
                (directory / FILE_NAME).unlink()
                directory.rmdir()


def _open_locked(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
            if _is_at(file, path):
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            file.close()
            by = f"process {holder}" if holder.isdigit() else "another process"
            raise InputError(f"{path.parent}: in use by {by}; wait for it, or give another --out") from None
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: TextIO) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the file is still there: the last holder may have removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
