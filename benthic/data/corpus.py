"""Where text comes from: two corpora that need no download, and the user's own files.

``chitchat`` is the chitchat-dataset package (conversations of two people), ``stdlib`` the running interpreter's
standard library; anything else is the path of a file or folder.
"""

import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benthic.config.schema import DataConfig
from benthic.data.document import Document, Rejection, Turn
from benthic.data.text_files import find_files, read_file
from benthic.errors import InputError, MissingExtra
from benthic.files import sha256

NAMED = ("chitchat", "stdlib")
_CHITCHAT_TEXT = 0.316
"""Of its file, which has other things in it too."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def read_corpus(sources: Sequence[str]) -> Iterator[Document | Rejection]:
    """All documents of ``sources`` in a fixed order, between them what had to be rejected.

    Every source is found before the first is read. Raises ``InputError`` for a path that is missing, unreadable or of
    an unsupported kind, ``MissingExtra`` for ``chitchat`` without its package.
    """
    files = {source: _files(source) for source in sources}
    for source in sources:
        if source == "chitchat":
            yield from _read_chitchat(files[source][0])
        else:
            for path in files[source]:
                yield from read_file(path)


def absolute_paths(config: DataConfig) -> DataConfig:
    """The same settings wherever the next command is given: relative paths are those of the present directory."""
    sources = tuple(source if source in NAMED else str(Path(source).absolute()) for source in config.sources)
    tokenizer = config.tokenizer and str(Path(config.tokenizer).absolute())
    return config.model_copy(update={"sources": sources, "tokenizer": tokenizer})


def files_digest(sources: Iterable[str]) -> str:
    """Hash of the names and contents of the user's own files, to notice that a prepared corpus has changed since.

    Raises ``InputError`` if one is not there or cannot be read.
    """
    state = hashlib.sha256()
    for source in sources:
        for path in [] if source in NAMED else _files(source):
            try:
                state.update(f"{os.fsencode(path.name).hex()} {sha256(path)}\n".encode())
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return state.hexdigest()


def text_bytes(sources: Iterable[str]) -> int:
    """About how much text there is in some sources: the size of their files. Raises as :func:`read_corpus`."""
    return sum(
        round(path.stat().st_size * (_CHITCHAT_TEXT if source == "chitchat" else 1))
        for source in sources
        for path in _files(source)
    )


def _files(source: str) -> list[Path]:
    if source == "chitchat":
        return [_chitchat_file()]
    if source == "stdlib":
        return _stdlib_files()
    return find_files(Path(source))


def _chitchat_file() -> Path:
    package = importlib.util.find_spec("chitchat_dataset")
    if package is None or package.origin is None:
        raise MissingExtra("chitchat-dataset", "quickstart")
    return Path(package.origin).with_name("dataset.json")


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(root.rglob("*.py")) if not _NOT_LIBRARY & set(path.relative_to(root).parts)]


def _read_chitchat(path: Path) -> Iterator[Document | Rejection]:
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read; reinstall chitchat-dataset") from None
    for name, conversation in conversations.items():
        turns = tuple(_chitchat_turns(conversation["messages"]))
        yield Document(turns) if turns else Rejection(f"{path}#{name}", 0, "empty document")


def _chitchat_turns(messages: list[list[dict[str, Any]]]) -> Iterator[Turn]:
    """Whoever speaks first is the user; messages in a row by one sender are the lines of one turn."""
    for position, group in enumerate(messages):
        text = "\n".join(message["text"] for message in group)
        if text.strip():
            yield Turn("assistant" if position % 2 else "user", text)
