"""A folder that appears complete or not at all, so that an interrupted export leaves nothing to mistake for one."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from benthic.errors import InputError
from benthic.files import cannot_write, sync


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A draft folder to fill; when the block ends well it takes the place of ``out``, else it is removed.

    Args:
        out: where the folder appears; missing parents are made.
        replace: whether a folder that is there and not empty may be replaced.

    Raises:
        InputError: ``out`` is a file, or a folder that may not be replaced, or cannot be written.
        WorkFailed: the disk is full.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not replace):
        raise InputError(f"{out}: already there and not replaced; give a path that is free or an empty folder")
    draft = _sibling(out, "draft")
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in [*draft.rglob("*"), draft]:
            sync(path)
        _swap(draft, out)
    except (OSError, SafetensorError) as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, out: Path) -> None:
    old = _sibling(out, "old")
    if out.exists():
        out.rename(old)
    try:
        draft.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(out: Path, purpose: str) -> Path:
    return out.absolute().with_name(f".{out.absolute().name}.{uuid.uuid4().hex}.{purpose}")
