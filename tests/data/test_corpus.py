"""Readers keep the user's text exactly, and turn what is unusable into rejections that say where."""

import importlib.util
import itertools
import json
import os
import random
import tracemalloc

import pytest

from benthic.data import corpus, text_files
from benthic.data.corpus import read_corpus
from benthic.data.document import Document, Rejection, Turn, plain_document
from benthic.errors import InputError, MissingExtra


def read(*paths):
    return list(read_corpus([str(path) for path in paths]))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_a_document(tmp_path):
    for suffix, text in ((".txt", "a\r\nb"), (".md", "# é\n\n\ntext\n"), (".PY", "x = '😀'\n")):
        assert read(write(tmp_path / f"file{suffix}", text)) == [plain_document(text)]


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == [plain_document("hello")]


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    write(tmp_path / "a.txt", "x")
    assert read(tmp_path) == [plain_document("x")]


def test_a_folder_is_read_in_order_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/x.py", "c.png", "a/b.py"):
        write(tmp_path / name, name)
    assert [item.plain_text for item in read(tmp_path)] == ["b.txt\n", "a/b.py\n", "a/z.md\n"]


@pytest.mark.parametrize("seed", range(5))
def test_a_long_text_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 100)
    rng = random.Random(seed)
    text = "".join("wörd " * rng.randrange(1, 9) + "\n" * rng.randrange(1, 3) for _ in range(99))
    texts = [document.turns[0].text for document in read(write(tmp_path / "a.txt", text))]
    assert "".join(texts) == text
    assert len(texts) > 10
    assert all(100 <= len(piece.encode()) < 300 for piece in texts[:-1])
    assert all(piece.endswith("\n\n") or len(piece.encode()) >= 200 for piece in texts[:-1])


def test_bad_text_is_rejected_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 50)
    empty, blank = write(tmp_path / "empty.txt", ""), write(tmp_path / "blank.txt", " \n\n")
    latin = write(tmp_path / "latin.txt", b"fine\ncaf" + b"\xe9\n")
    long = write(tmp_path / "long.txt", "before\n" + "x" * 51 + "\nafter\n")
    assert read(empty, blank, latin, long) == [
        Rejection(str(empty), 0, "empty document"),
        Rejection(str(blank), 0, "empty document"),
        Rejection(str(latin), 8, "invalid UTF-8"),
        plain_document("before\n"),
        Rejection(str(long), 7, "line longer than 50 bytes"),
        plain_document("after\n"),
    ]


def test_a_huge_line_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.truncate(200 << 20)
        file.seek(0, 2)
        file.write(b'\n{"text": "after"}\n')
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [
        Rejection(str(path), 0, f"line longer than {text_files.MAX_LINE_BYTES} bytes"),
        plain_document("after"),
    ]
    assert peak < 40 << 20


def test_jsonl_records(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    lines = [json.dumps({"text": "é\n", "more": 1}), "", json.dumps({"messages": messages})]
    assert read(write(tmp_path / "a.jsonl", "\n".join(lines))) == [
        plain_document("é\n"),
        Document((Turn("user", "hi"), Turn("assistant", "yo"))),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "bad JSON: Expecting property name"),
        (b"[1]", "not an object"),
        (b'{"text": 3}', "no string under"),
        (b'{"messages": "hi"}', "not an object"),
        (b'{"messages": [{"role": "user"}]}', "without a string"),
        (b'{"messages": [{"role": "me", "content": "x"}]}', 'whose "role"'),
        (b'{"messages": []}', "empty document"),
        (b'{"text": " "}', "empty document"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "integer string conversion"),
    ],
)
def test_bad_jsonl_lines_are_rejected_and_the_next_is_read(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "two"}')
    first, rejection, last = read(path)
    assert (first, last) == (plain_document("one"), plain_document("two"))
    assert reason in rejection.reason
    assert rejection.file == str(path)
    assert rejection.offset == 16 + (10 if "UTF-8" in reason else 0)


def test_what_cannot_be_read_is_one_line_before_anything_is(tmp_path):
    good = write(tmp_path / "good.txt", "x")
    image, folder = write(tmp_path / "a.png", "x"), tmp_path / "none"
    folder.mkdir()
    for bad, message in (
        (tmp_path / "missing.txt", "no such file"),
        (image, "allowed are .txt"),
        (folder, "no .txt"),
        (tmp_path / ("x" * 300), "cannot be read"),
        ("a\0b", "no such file"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            next(read_corpus([str(good), str(bad)]))
        assert "\n" not in str(refused.value)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: Permission denied"):
        read(path)


def test_chitchat_speakers_alternate():
    package = importlib.util.find_spec("chitchat_dataset")
    if package is None:
        pytest.skip("chitchat-dataset is not installed")
    documents = read("chitchat")
    assert len(documents) == 7168
    roles = [[turn.role for turn in document.turns] for document in documents]
    assert all(each[0] in ("user", "assistant") for each in roles)
    assert sum(a == b for each in roles for a, b in itertools.pairwise(each)) < 20
    assert documents[0].turns[:2] == (
        Turn("user", "Hello\nHow are you doing today?"),
        Turn("assistant", "whats up MD\nim doing good\nhow are you doing?"),
    )


def test_chitchat_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"benthic\[quickstart\]"):
        read("chitchat")


def test_stdlib_is_the_library_without_its_tests():
    names = [str(path) for path in corpus._stdlib_files()]
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)
