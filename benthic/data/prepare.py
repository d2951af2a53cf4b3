"""From raw text to a tokenizer and token shards, in three passes over the corpus and bounded memory.

The passes are: count and split, train the tokenizer on the training split alone, encode. Results are built in a
temporary directory and renamed into place, the data last, so an interruption leaves nothing that looks finished.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from benthic.config.schema import DataConfig
from benthic.data.corpus import absolute_paths, files_digest, read_corpus
from benthic.data.document import Document
from benthic.data.manifest import FILE_NAME, SPLITS, Manifest, Split, SplitManifest
from benthic.data.shards import ShardWriter, TokenStore, token_dtype
from benthic.data.split import Survey, split_documents, survey
from benthic.data.tokenizer import TOKENIZER_FILES, Tokenizer
from benthic.errors import InputError
from benthic.files import sync
from benthic.lock import locked

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many documents are done, and how many there are if that is known."""

SOURCES_HASH = "source_sha256"
"""Key of the manifest's settings for the hash of the user's files."""
HELD_OUT = "held_out_up_to"
"""Key of the manifest's settings for the largest digest, in hexadecimal, of what is held out."""
ENCODE_BATCH = 256
REPORT_EVERY = 100
Item = TypeVar("Item")


def prepare(
    config: DataConfig, vocab_size: int, out: Path, progress: Progress = lambda *_: None, *, repair: bool = False
) -> Manifest:
    """Write ``out/tokenizer`` and ``out/data``, or keep them if they were prepared with the same settings.

    ``vocab_size`` is the model's; a tokenizer trained here has at most as many tokens. With ``repair``, what is there
    is made anew. Raises ``InputError`` for a corpus that cannot be read or split, a tokenizer that does not fit, data
    that was prepared differently or cannot be made again as it was, an ``out`` with a model in it, or if another
    process works in ``out``.
    """
    refuse_model_directory(out)
    config, before = absolute_paths(config), None
    if (out / "data" / FILE_NAME).exists():
        before = _prepared_before(config, vocab_size, out)
        if not repair:
            check_tokenizer(out, before)
            return before
    with locked(out):
        if before is None:
            _refuse_to_replace(out)
        return _prepare(config, vocab_size, out, progress, before)


def damage(out: Path) -> InputError | None:
    """What is wrong with a file of the data prepared in ``out``, every byte of which is read; None if nothing is."""
    manifest = Manifest.load(out / "data")
    try:
        check_tokenizer(out, manifest)
        for split in SPLITS:
            TokenStore(out / "data", split)
    except InputError as error:
        return error
    return None


def refuse_model_directory(out: Path) -> None:
    """Raise ``InputError`` if ``out`` is, or holds, a model that another tokenizer or training would not fit."""
    if (out / "config.json").exists():
        raise InputError(f"{out}: is a model's directory, it has a config.json; choose another")
    if any(out.glob("model/*")) and not ((out / "data").exists() or (out / "checkpoints").exists()):
        raise InputError(f"{out / 'model'}: a model is there already, without data of its training; choose another")


def _prepare(
    config: DataConfig, vocab_size: int, out: Path, progress: Progress, before: Manifest | None = None
) -> Manifest:
    """Prepare, and replace what ``before`` describes if the result is the same."""
    files = files_digest(config.sources)
    found = survey(
        counted(read_corpus(config.sources), "reading", None, progress), config.validation_fraction, config.seed
    )
    tokenizer = _tokenizer(config, found, vocab_size, progress)
    settings = {**_settings(config, vocab_size), SOURCES_HASH: files, HELD_OUT: f"{found.threshold:x}"}
    with building(out) as folder:
        tokenizer.save(folder / "tokenizer")
        splits = _encode(config, found, tokenizer, folder / "data", progress)
        manifest = _manifest(found, tokenizer, splits, settings)
        if before is not None:
            _refuse_other_outcome(out, manifest, before)
            manifest = before  # as it was, to the byte: checkpoints know it by its hash
        manifest.save(folder / "data")
        for name in ("tokenizer", "data"):
            shutil.rmtree(out / name, ignore_errors=True)
            (folder / name).rename(out / name)
        sync(out)
    return manifest


def _refuse_to_replace(out: Path) -> None:
    """Only what a preparation that was cut short left behind is replaced: ``out/data`` may be the user's own corpus."""
    for name, left_behind in (("tokenizer", TOKENIZER_FILES), ("data", ())):
        path = out / name
        ours = path.is_dir() and not path.is_symlink() and all(file.name in left_behind for file in path.iterdir())
        if not ours and (path.exists() or path.is_symlink()):
            raise InputError(f"{path}: already there, and nothing that benthic prepared; choose another directory")


def _settings(config: DataConfig, vocab_size: int) -> dict[str, Any]:
    return {**config.model_dump(mode="json", exclude={"mask_documents"}), "vocab_size": vocab_size}


def _prepared_before(config: DataConfig, vocab_size: int, out: Path) -> Manifest:
    manifest = Manifest.load(out / "data")
    # Data of an earlier version may name its sources relative to where it was prepared.
    saved = manifest.settings | _settings(absolute_paths(manifest.prepared(config)), manifest.settings["vocab_size"])
    changed = files_changed(config.sources, manifest)
    for key, value in _settings(config, vocab_size).items():
        moved = key == "sources" and changed is False
        if saved.get(key) != value and not moved:
            raise InputError(
                f"{out / 'data'}: prepared with {key}={manifest.settings.get(key, saved.get(key))!r}, not {value!r}; "
                "choose another directory or delete this one"
            )
    if changed:
        raise InputError(
            f"{out / 'data'}: the files of {', '.join(config.sources)} have changed since it was "
            "prepared; choose another directory or delete this one"
        )
    return manifest


def check_tokenizer(out: Path, manifest: Manifest) -> str:
    """The fingerprint of ``out/tokenizer``; raises ``InputError`` if the data was prepared with another."""
    found = Tokenizer.load(out / "tokenizer").fingerprint
    if found != manifest.tokenizer_sha256:
        raise InputError(f"{out / 'tokenizer'}: not the tokenizer that {out / 'data'} was prepared with")
    return found


def files_changed(sources: Sequence[str], manifest: Manifest) -> bool | None:
    """Whether the sources hold other text now; None if nobody can tell."""
    try:
        now = files_digest(sources)
    except InputError:
        return None  # prepared data is whole without its sources, for instance on another machine
    return now != manifest.settings[SOURCES_HASH] if SOURCES_HASH in manifest.settings else None


def _refuse_other_outcome(out: Path, manifest: Manifest, before: Manifest) -> None:
    """A repair must give what was there: a checkpoint is of that, and would be of no use to anything else."""
    if (manifest.tokenizer_sha256, manifest.train, manifest.val) != (
        before.tokenizer_sha256, before.train, before.val,
    ):  # fmt: skip
        raise InputError(
            f"{out / 'data'}: damaged, and prepared anew it is another: a source or a library has changed; "
            "choose another directory"
        )


def _tokenizer(config: DataConfig, found: Survey, vocab_size: int, progress: Progress) -> Tokenizer:
    if config.tokenizer is None:
        documents = counted(_documents(config, found), "training the tokenizer", found.documents, progress)
        texts = (turn.text for split, document in documents if split == "train" for turn in document.turns)
        return Tokenizer.train(texts, vocab_size)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{config.tokenizer}: {tokenizer.vocab_size} tokens, but model.vocab_size={vocab_size}")
    return tokenizer


def _encode(
    config: DataConfig, found: Survey, tokenizer: Tokenizer, directory: Path, progress: Progress
) -> dict[Split, SplitManifest]:
    directory.mkdir()
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(directory, split, dtype) for split in SPLITS}
    documents = counted(_documents(config, found), "encoding", found.documents, progress)
    while batch := list(islice(documents, ENCODE_BATCH)):
        chat = config.conversations == "chat"
        encoded = tokenizer.encode_documents([document if chat else document.unspoken for _, document in batch])
        for (split, document), ids in zip(batch, encoded, strict=True):
            writers[split].append(ids, len(document.plain_text.encode()))
    return {split: writer.close() for split, writer in writers.items()}


def _documents(config: DataConfig, found: Survey) -> Iterator[tuple[Split, Document]]:
    return split_documents(config.sources, config.seed, found.threshold)


def _manifest(
    found: Survey, tokenizer: Tokenizer, splits: dict[Split, SplitManifest], settings: dict[str, Any]
) -> Manifest:
    train, val = splits["train"], splits["val"]
    return Manifest(
        documents=train.documents + val.documents,
        tokens=train.tokens + val.tokens,
        bytes=train.bytes + val.bytes,
        rejected=found.rejected,
        duplicates=found.duplicates,
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        tokenizer_sha256=tokenizer.fingerprint,
        settings=settings,
        rejections=found.rejections,
        train=train,
        val=val,
    )


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A fresh directory inside ``out`` that is gone afterwards."""
    folder = out / ".preparing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def counted(items: Iterable[Item], doing: str, total: int | None, progress: Progress) -> Iterator[Item]:
    """The items, with a report of how many there were every hundred and at the end."""
    done = 0
    for done, item in enumerate(items, 1):
        if done % REPORT_EVERY == 0:
            progress(doing, done, total)
        yield item
    progress(doing, done, done)
