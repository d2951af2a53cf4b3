"""Preparation keeps the splits apart, counts honestly, repeats exactly, and is never found half done."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from benthic.config.schema import DataConfig
from benthic.data.corpus import read_corpus
from benthic.data.document import Document
from benthic.data.manifest import Manifest
from benthic.data.prepare import damage, prepare
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.lock import locked


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored_documents(run, split):
    store = TokenStore(run / "data", split)
    ids, start = store.take(np.arange(store.tokens)).tolist(), 0
    for end in store.document_ends_D.tolist():
        yield tuple(ids[start:end])
        start = end


def test_every_unique_document_is_in_one_split(prepared, data_config):
    tokenizer = Tokenizer.load(prepared)
    documents = [item for item in read_corpus(data_config.sources) if isinstance(item, Document)]
    expected = {tuple(ids) for ids in tokenizer.encode_documents(documents)}
    train, val = (list(stored_documents(prepared, split)) for split in ("train", "val"))
    assert len(documents) == 120
    assert len(train) == 72
    assert len(val) == 18
    assert {*train, *val} == expected
    assert not {*train} & {*val}


def test_conversations_may_be_read_as_text(prepared, data_config, tmp_path):
    """The same documents on the same sides, a turn a line; bytes count the same."""
    as_text = data_config.model_copy(update={"conversations": "text"})
    manifest, before = prepare(as_text, 400, tmp_path), Manifest.load(prepared / "data")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.fingerprint == Tokenizer.load(prepared).fingerprint
    documents = {item.plain_text for item in read_corpus(data_config.sources) if isinstance(item, Document)}
    assert any("\n" in text[:-1] for text in documents)
    for split in ("train", "val"):
        read = [tokenizer.decode(ids[1:-1]) + "\n" for ids in stored_documents(tmp_path, split)]
        assert set(read) <= documents
        assert len(read) == len(list(stored_documents(prepared, split)))
        used = {index for ids in stored_documents(tmp_path, split) for index in ids}
        assert not used & {*tokenizer.role_ids.values()}
    assert (manifest.train.bytes, manifest.val.bytes) == (before.train.bytes, before.val.bytes)


def test_data_from_before_there_was_a_choice_is_in_the_chat_format(prepared, data_config, tmp_path):
    shutil.copytree(prepared, tmp_path / "old")
    manifest = Manifest.load(tmp_path / "old" / "data")
    settings = {key: value for key, value in manifest.settings.items() if key != "conversations"}
    manifest.model_copy(update={"settings": settings}).save(tmp_path / "old" / "data")
    prepare(data_config, 400, tmp_path / "old")
    with pytest.raises(InputError, match="conversations='chat', not 'text'"):
        prepare(data_config.model_copy(update={"conversations": "text"}), 400, tmp_path / "old")


def test_the_manifest_counts(prepared, data_config):
    manifest = Manifest.load(prepared / "data")
    unique = {item.plain_text for item in read_corpus(data_config.sources) if isinstance(item, Document)}
    assert (manifest.documents, manifest.duplicates, manifest.rejected) == (90, 30, 2)
    assert manifest.bytes == sum(len(text.encode()) for text in unique) == manifest.train.bytes + manifest.val.bytes
    assert manifest.train_tokens == sum(map(len, stored_documents(prepared, "train")))
    assert manifest.val_tokens == sum(map(len, stored_documents(prepared, "val")))
    assert manifest.tokens == manifest.train_tokens + manifest.val_tokens
    assert [rejection.reason.split(":")[0] for rejection in manifest.rejections] == ["bad JSON", "empty document"]
    assert manifest.vocab_size == Tokenizer.load(prepared).vocab_size <= 400
    promised = ["documents", "tokens", "bytes", "rejected", "duplicates", "train_tokens", "val_tokens"]
    assert set(promised) <= set(json.loads((prepared / "data" / "manifest.json").read_text()))


def test_the_tokenizer_sees_only_the_training_split(prepared, data_config, tmp_path):
    tokenizer = Tokenizer.load(prepared)
    val = set(stored_documents(prepared, "val"))
    documents = [item for item in read_corpus(data_config.sources) if isinstance(item, Document)]
    unique = dict(zip(map(tuple, tokenizer.encode_documents(documents)), documents, strict=True))
    train = [turn.text for ids, document in unique.items() if ids not in val for turn in document.turns]
    assert Tokenizer.train(train, 400).fingerprint == tokenizer.fingerprint


def test_preparing_again_gives_the_same_bytes_or_keeps_them(prepared, data_config, tmp_path):
    before = contents(prepared)
    prepare(data_config, 400, tmp_path / "other")
    assert contents(tmp_path / "other") == before
    times = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert prepare(data_config, 400, prepared) == Manifest.load(prepared / "data")
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == times


@pytest.mark.parametrize(
    ("change", "vocab_size", "named"),
    [
        ({"seed": 4}, 400, "seed=3, not 4"),
        ({"validation_fraction": 0.1}, 400, "validation_fraction=0.2, not 0.1"),
        ({}, 500, "vocab_size=400, not 500"),
    ],
)
def test_other_settings_are_refused_with_the_difference(prepared, data_config, change, vocab_size, named):
    with pytest.raises(InputError, match=named):
        prepare(data_config.model_copy(update=change), vocab_size, prepared)


def test_changed_files_and_another_tokenizer_are_refused_but_missing_files_are_not(data_config, corpus_file, tmp_path):
    copy, run = tmp_path / "corpus.jsonl", tmp_path / "run"
    copy.write_bytes(corpus_file.read_bytes())
    config = data_config.model_copy(update={"sources": (str(copy),)})
    prepare(config, 400, run)
    with copy.open("a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(InputError, match="have changed"):
        prepare(config, 400, run)
    copy.unlink()
    assert prepare(config, 400, run).documents == 90
    Tokenizer.train(["something else"], 300).save(run / "tokenizer")
    with pytest.raises(InputError, match="not the tokenizer"):
        prepare(config, 400, run)


@pytest.mark.parametrize("restore_times", [False, True])
def test_a_file_that_changed_without_a_change_of_size_is_noticed(data_config, corpus_file, tmp_path, restore_times):
    copy = tmp_path / "corpus.jsonl"
    copy.write_bytes(corpus_file.read_bytes())
    config, before = data_config.model_copy(update={"sources": (str(copy),)}), copy.stat()
    prepare(config, 400, tmp_path / "run")
    copy.write_bytes(corpus_file.read_bytes().replace(b"e", b"a", 1))
    if restore_times:
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="have changed"):
        prepare(config, 400, tmp_path / "run")


def test_a_file_that_is_only_newer_has_not_changed(data_config, corpus_file, tmp_path):
    copy = tmp_path / "corpus.jsonl"
    copy.write_bytes(corpus_file.read_bytes())
    config = data_config.model_copy(update={"sources": (str(copy),)})
    before = prepare(config, 400, tmp_path / "run")
    os.utime(copy, (1, 1))
    assert prepare(config, 400, tmp_path / "run") == before


def test_relative_paths_are_those_of_where_it_was_prepared(data_config, corpus_file, tmp_path, monkeypatch):
    config = data_config.model_copy(update={"sources": ("corpus.jsonl",)})
    for folder, text in (("here", corpus_file.read_text()), ("there", '{"text": "another"}\n{"text": "corpus"}\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "corpus.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    prepared = prepare(config, 400, tmp_path / "run")
    assert prepared.prepared(config).sources == (str(tmp_path / "here" / "corpus.jsonl"),)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(InputError, match=r"prepared with sources=.*here.corpus.jsonl.*not .*there.corpus.jsonl"):
        prepare(config, 400, tmp_path / "run")
    assert prepare(prepared.prepared(config), 400, tmp_path / "run") == prepared
    # The same text at another place is the same corpus.
    (tmp_path / "there" / "corpus.jsonl").write_text(corpus_file.read_text())
    assert prepare(config, 400, tmp_path / "run") == prepared


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["data/train-00000.bin", "data/val-boundaries.bin", "tokenizer/tokenizer.json", "data/val-00000.bin"]
)
def test_damaged_data_is_made_again_to_the_byte(data_config, prepared, tmp_path, name):
    run = shutil.copytree(prepared, tmp_path / "copy")
    assert damage(run) is None
    flip_a_byte(run / name)
    assert name.partition("/")[0] in str(damage(run))
    prepare(data_config, 400, run, repair=True)
    assert damage(run) is None
    assert contents(run) == contents(prepared)


def test_a_repair_that_would_give_other_data_is_refused(data_config, corpus_file, tmp_path):
    copy, run = tmp_path / "corpus.jsonl", tmp_path / "run"
    copy.write_bytes(corpus_file.read_bytes())
    config = data_config.model_copy(update={"sources": (str(copy),)})
    manifest = prepare(config, 400, run)
    # As a version of Benthic does that did not keep a hash of the sources.
    settings = {key: value for key, value in manifest.settings.items() if key != "source_sha256"}
    manifest.model_copy(update={"settings": settings}).save(run / "data")
    flip_a_byte(run / "data" / "train-00000.bin")
    copy.write_text(corpus_file.read_text().replace(" ", "  "))
    before = contents(run)
    with pytest.raises(InputError, match="prepared anew it is another"):
        prepare(config, 400, run, repair=True)
    assert contents(run) == before


def test_a_directory_with_a_model_is_refused(data_config, tmp_path):
    for name in ("exported/config.json", "imported/model/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"exported: is a model's directory"):
        prepare(data_config, 400, tmp_path / "exported")
    with pytest.raises(InputError, match=r"imported/model: a model is there already"):
        prepare(data_config, 400, tmp_path / "imported")
    assert len(list(tmp_path.rglob("*"))) == 5


def test_what_was_left_out_is_told(prepared):
    (remark,) = Manifest.load(prepared / "data").remarks()
    assert remark.startswith("rejected: 2, first ")
    assert "bad JSON" in remark
    assert "under rejections" in remark


@pytest.mark.parametrize(("documents", "told"), [(2, "50%"), (5, "20%"), (40, None)])
def test_much_more_held_out_than_asked_for_is_told(tmp_path, documents, told):
    (tmp_path / "corpus.jsonl").write_text("".join(f'{{"text": "number {i:03}"}}\n' for i in range(documents)))
    manifest = prepare(DataConfig(sources=(str(tmp_path / "corpus.jsonl"),)), 300, tmp_path / "out")
    remarks = manifest.remarks()
    assert bool(remarks) == bool(told)
    if told:
        assert f"{told} of the text is held out, where data.validation_fraction=0.05" in remarks[0]


@pytest.mark.parametrize("change", [{"vocab_size": "many"}, {"vocab_size": None}, {"validation_fraction": "x"},
                                    {"sources": 5}])  # fmt: skip
def test_settings_of_a_manifest_that_cannot_be_used_are_refused(prepared, tmp_path, change):
    manifest = Manifest.load(prepared / "data")
    manifest.model_copy(update={"settings": {**manifest.settings, **change}}).save(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        Manifest.load(tmp_path)


def test_the_split_depends_on_the_seed_and_not_on_the_order(prepared, data_config, corpus_file, tmp_path):
    lines = corpus_file.read_text().split("\n")
    reordered = tmp_path / "reordered.jsonl"
    reordered.write_text("\n".join(lines[::-1]))
    tokenizer = str(prepared / "tokenizer")
    same = data_config.model_copy(update={"sources": (str(reordered),), "tokenizer": tokenizer})
    prepare(same, 400, tmp_path / "same")
    prepare(same.model_copy(update={"seed": 9}), 400, tmp_path / "different")
    held_out = set(stored_documents(prepared, "val"))
    assert set(stored_documents(tmp_path / "same", "val")) == held_out
    assert set(stored_documents(tmp_path / "different", "val")) != held_out


def test_a_tokenizer_too_large_for_the_model_is_refused(prepared, data_config, tmp_path):
    config = data_config.model_copy(update={"tokenizer": str(prepared / "tokenizer")})
    with pytest.raises(InputError, match=r"model\.vocab_size=300"):
        prepare(config, 300, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "only one"])
def test_a_corpus_that_cannot_be_split_leaves_nothing_behind(data_config, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    config = data_config.model_copy(update={"sources": (str(tmp_path / "a.txt"),)})
    with pytest.raises(InputError, match="at least 2 are needed"):
        prepare(config, 400, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_where_the_data_would_go_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(5):
        (tmp_path / "data" / f"{number}.txt").write_text(f"text {number} " * 20)
    with pytest.raises(InputError, match="already there"):
        prepare(DataConfig(sources=(str(tmp_path / "data"),)), 320, tmp_path)
    assert len(list((tmp_path / "data").iterdir())) == 5


def test_a_directory_in_use_is_refused(data_config, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(InputError, match="out: in use by process"):
        prepare(data_config, 400, tmp_path / "out")


def test_an_interruption_leaves_nothing_behind(data_config, tmp_path):
    def interrupt(doing, *_):
        if doing == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data_config, 400, tmp_path / "out", interrupt)
    assert not (tmp_path / "out").exists()


def test_after_a_kill_preparation_starts_over(prepared, data_config, tmp_path):
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom benthic.config.schema import DataConfig\n"
        "from benthic.data import prepare\n"
        "rename = Path.rename\n"
        "def kill(path, target):\n"
        "    if path.name == 'data': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(path, target)\n"
        "Path.rename = kill\n"
        "prepare.prepare(DataConfig.model_validate_json(sys.argv[1]), 400, Path(sys.argv[2]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, data_config.model_dump_json(), str(out)],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -9
    assert (out / "tokenizer").exists()
    assert not (out / "data").exists()
    prepare(data_config, 400, out)
    assert contents(out) == contents(prepared)


def test_progress_reaches_the_number_of_documents(data_config, tmp_path):
    seen = {}
    prepare(data_config, 400, tmp_path / "out", lambda doing, done, total: seen.update({doing: (done, total)}))
    assert seen == {"reading": (122, 122), "training the tokenizer": (90, 90), "encoding": (90, 90)}


@pytest.mark.slow
def test_chitchat_is_prepared_in_seconds(data_config, tmp_path):
    started = time.perf_counter()
    manifest = prepare(data_config.model_copy(update={"sources": ("chitchat",)}), 4096, tmp_path)
    assert time.perf_counter() - started < 60
    assert manifest.documents == 6239
    assert manifest.duplicates == 929
