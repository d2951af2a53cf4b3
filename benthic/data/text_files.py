"""Documents from the user's own files, with bounded memory whatever the files contain.

Nothing here stops at bad content: what cannot be used becomes a ``Rejection`` with its file and byte offset.
"""

import codecs
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from benthic.data.document import ROLES, Document, Rejection, Turn, plain_document
from benthic.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
MAX_LINE_BYTES = 8 << 20
Record = TypeVar("Record")
DOCUMENT_BYTES = 64 << 10
"""A longer text file is cut at its next blank line, so that one large file still has documents to hold out."""


def find_files(path: Path) -> list[Path]:
    """``path`` itself, or the supported files below it in sorted order, hidden ones left out.

    Raises ``InputError`` where there is nothing to read.
    """
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        found = [
            Path(folder) / name
            for folder, _, names in _walk(path)
            for name in sorted(names)
            if not name.startswith(".")
            and name.lower().endswith(SUFFIXES)
            # Reading a pipe or a device would never end.
            and stat.S_ISREG(_mode(Path(folder) / name))
        ]
        if not found:
            raise InputError(f"{path}: no {', '.join(SUFFIXES)} files in this folder")
        return found
    if not stat.S_ISREG(mode) or path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: not a kind of file that can be read; allowed are {', '.join(SUFFIXES)}")
    return [path]


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, ValueError):
        raise InputError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(path, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, subfolders, names


def read_file(path: Path) -> Iterator[Document | Rejection]:
    """The documents of one file in order; raises ``InputError`` if it cannot be read."""
    try:
        yield from (_read_jsonl(path, _parse_record) if path.suffix.lower() == ".jsonl" else _read_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Byte offset and content of each line, ``None`` instead of a line over ``MAX_LINE_BYTES``."""
    with path.open("rb") as file:
        offset = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) <= MAX_LINE_BYTES:
                yield offset, line
            else:
                yield offset, None
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
            offset = file.tell()


def _overlong(path: Path, offset: int) -> Rejection:
    return Rejection(str(path), offset, f"line longer than {MAX_LINE_BYTES} bytes")


def _read_text(path: Path) -> Iterator[Document | Rejection]:
    for offset, data in _pieces(path):
        yield _overlong(path, offset) if data is None else _text_document(path, offset, data)


def _pieces(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Byte offset and content of each document of a text file, ``None`` for an overlong line.

    A piece ends at the first blank line past ``DOCUMENT_BYTES``, or at twice that; an empty file is one empty piece.
    """
    start, piece = 0, bytearray()
    for offset, line in _lines(path):
        if not piece:
            start = offset
        if line is not None:
            piece += line
        long_enough = len(piece) >= (2 if line and line.strip() else 1) * DOCUMENT_BYTES
        if piece and (line is None or long_enough):
            yield start, bytes(piece)
            piece.clear()
        if line is None:
            yield offset, None
    if piece or not path.stat().st_size:
        yield start, bytes(piece)


def _text_document(path: Path, offset: int, data: bytes) -> Document | Rejection:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Rejection(str(path), offset + error.start, "invalid UTF-8")
    return plain_document(text) if text.strip() else Rejection(str(path), offset, "empty document")


class RecordError(ValueError):
    """A JSON record that cannot be used."""


def read_records(path: Path, parse: Callable[[Any], Record]) -> Iterator[Record | Rejection]:
    """What ``parse``, which may raise ``ValueError``, makes of the lines of a .jsonl file, in order.

    Raises ``InputError`` if the file cannot be read.
    """
    try:
        yield from _read_jsonl(path, parse)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _read_jsonl(path: Path, parse: Callable[[Any], Record]) -> Iterator[Record | Rejection]:
    for offset, line in _lines(path):
        if line is None:
            yield _overlong(path, offset)
        elif line.strip():
            try:
                yield parse(json.loads(line.decode()))
            except UnicodeDecodeError as error:
                yield Rejection(str(path), offset + error.start, "invalid UTF-8")
            except (ValueError, RecursionError) as error:
                yield Rejection(str(path), offset, _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return "lone surrogate in text"
    return f"bad JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)


def _parse_record(record: Any) -> Document:
    """``{"text": ...}`` or ``{"messages": [{"role", "content"}, ...]}``; raises a ``ValueError`` that says why not."""
    if not isinstance(record, dict) or not isinstance(record.get("messages", []), list):
        raise RecordError('not an object with "text" or "messages"')
    if "messages" in record:
        document = Document(tuple(_parse_message(message) for message in record["messages"]))
    elif isinstance(record.get("text"), str):
        document = plain_document(record["text"])
    else:
        raise RecordError('no string under "text" and no list under "messages"')
    document.plain_text.encode()
    if not document.plain_text.strip():
        raise RecordError("empty document")
    return document


def _parse_message(message: Any) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise RecordError('a message without a string under "content"')
    if message.get("role") not in ROLES:
        raise RecordError(f'a message whose "role" is not one of {", ".join(ROLES)}')
    return Turn(message["role"], message["content"])
