"""From conversations to samples on disk, once, before anything is trained on them.

What pretraining held out is held out here: the sides are told by the same digests and the same threshold. The samples
lie in ``sft/`` of a run in the format of ``benthic/data/shards.py``, answers marked as
``benthic/posttrain/packing.py`` reads them.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benthic.config.posttrain import PROBLEMS, ConversationsConfig, SftConfig
from benthic.config.schema import DataConfig, RunConfig
from benthic.config.stages import BASE
from benthic.data.chat import Answers, ChatFormat, Sample
from benthic.data.conversations import Conversation, pieces, read_conversations
from benthic.data.corpus import NAMED, files_digest, read_corpus
from benthic.data.document import Document, Rejection, digest
from benthic.data.manifest import FILE_NAME, SPLITS, Manifest, Split
from benthic.data.prepare import HELD_OUT, SOURCES_HASH, Progress, building, counted, files_changed
from benthic.data.shards import ShardWriter, TokenStore, token_dtype
from benthic.data.split import Survey, survey
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.files import read_json_object, sync
from benthic.posttrain.problem_files import ANSWERED
from benthic.posttrain.problem_files import FOLDER as PROBLEMS_FOLDER

FOLDER = "sft"
SAMPLES = "samples"
"""Key of the manifest's settings for the number of samples of each source, by split."""
BYTES = "answer_bytes"
"""Key of the manifest's settings for the bytes of each source's answers, by split."""


def prepare_sft(config: RunConfig, out: Path, progress: Progress = lambda *_: None) -> Manifest:
    """Write ``out/sft``, or keep it if it was made from the same conversations with the same settings and is whole.

    ``config`` has the length of the stage's sequences under ``train``. Raises InputError for sources that cannot be
    read or hold no answer, or if it cannot be told what pretraining held out.
    """
    tokenizer = Tokenizer.load(out / "tokenizer")
    sources = sft_sources(config)
    split = _pretraining_split(config, out)
    data = DataConfig(
        sources=tuple(one.source for one in sources), seed=split.seed, validation_fraction=split.validation_fraction
    )
    settings = _settings(config, data, tokenizer)
    folder = out / FOLDER
    places = [str(out / PROBLEMS_FOLDER / ANSWERED) if source == PROBLEMS else source for source in data.sources]
    if (folder / FILE_NAME).is_file() and (kept := _as_before(folder, places, settings)) is not None:
        return kept
    settings[SOURCES_HASH] = files_digest(places)
    found = survey(
        counted((_document(item) for place in places for item in read_conversations(place)), "reading", None, progress),
        data.validation_fraction, data.seed, split.threshold,
    )  # fmt: skip
    with building(out) as draft:
        return _write(draft, folder, places, settings, found, tokenizer, config, progress)


def sft_sources(config: RunConfig) -> tuple[ConversationsConfig, ...]:
    """The mixture: as given, with absolute paths, or what pretraining reads."""
    given = _sft(config).sources or tuple(ConversationsConfig(source=source) for source in config.data.sources)
    return tuple(
        one if one.source in (*NAMED, PROBLEMS) else one.model_copy(update={"source": str(Path(one.source).absolute())})
        for one in given
    )


def _sft(config: RunConfig) -> SftConfig:
    assert config.posttrain.sft is not None
    return config.posttrain.sft


def _settings(config: RunConfig, data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **data.model_dump(mode="json"),
        "vocab_size": 2 * tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        "capacity": config.train.sequence_length + 1,
        "answers": _sft(config).answers,
    }


def _as_before(folder: Path, places: Sequence[str], settings: dict[str, Any]) -> Manifest | None:
    """What is there already, if it is what is wanted and none of it is damaged."""
    try:
        manifest = Manifest.load(folder)
        for split in SPLITS:
            TokenStore(folder, split)
    except InputError:
        return None  # it can be made anew
    same = all(manifest.settings.get(key) == value for key, value in settings.items() if key != "sources")
    changed = files_changed(places, manifest)
    same_sources = manifest.settings.get("sources") == settings["sources"] or changed is False
    return manifest if same and same_sources and not changed else None


def _write(
    draft: Path, folder: Path, places: Sequence[str], settings: dict[str, Any], found: Survey, tokenizer: Tokenizer,
    config: RunConfig, progress: Progress,
) -> Manifest:  # fmt: skip
    dtype = token_dtype(2 * tokenizer.vocab_size)
    writers = {split: ShardWriter(draft, split, dtype) for split in SPLITS}
    samples, answer_bytes = ({split: [0] * len(places) for split in SPLITS} for _ in "12")
    chat, capacity, answers = ChatFormat(tokenizer), config.train.sequence_length + 1, _sft(config).answers
    sides = _split(places, settings["seed"], found)
    for number, split, conversation in counted(sides, "encoding answers", found.documents, progress):
        for sample in _samples(conversation, chat, capacity, answers, places[number]):
            marks = zip(sample.ids, sample.learn, strict=True)
            writers[split].append([index + learn * tokenizer.vocab_size for index, learn in marks], sample.answer_bytes)
            samples[split][number] += 1
            answer_bytes[split][number] += sample.answer_bytes
    for split, counts in samples.items():
        if not sum(counts):
            side = "to learn from" if split == "train" else "held out"
            names = ", ".join(settings["sources"])
            raise InputError(f"posttrain.sft: of {names}, no conversation {side} holds an answer")
    parts = {split: writer.close() for split, writer in writers.items()}
    train, val = parts["train"], parts["val"]
    manifest = Manifest(
        documents=train.documents + val.documents, tokens=train.tokens + val.tokens, bytes=train.bytes + val.bytes,
        rejected=found.rejected, duplicates=found.duplicates, train_tokens=train.tokens, val_tokens=val.tokens,
        vocab_size=2 * tokenizer.vocab_size, dtype=dtype, tokenizer_sha256=tokenizer.fingerprint,
        settings={**settings, SAMPLES: samples, BYTES: answer_bytes, HELD_OUT: f"{found.threshold:x}"},
        rejections=found.rejections,
        train=train, val=val,
    )  # fmt: skip
    manifest.save(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    sync(folder.parent)
    return manifest


def _samples(
    conversation: Conversation, chat: ChatFormat, capacity: int, answers: Answers, source: str
) -> Iterator[Sample]:
    try:
        yield from pieces(conversation, chat, capacity, answers)
    except InputError as error:
        first = conversation.messages[0]["content"]
        raise InputError(f"{source}: the conversation that begins {first[:40]!r}: {error}") from None


def _split(places: Sequence[str], seed: int, found: Survey) -> Iterator[tuple[int, Split, Conversation]]:
    """Unique conversations with the number of their source and their split."""
    seen = set[int]()
    for number, place in enumerate(places):
        for item in read_conversations(place):
            if isinstance(item, Conversation) and (key := digest(item.document, seed)) not in seen:
                seen.add(key)
                yield number, "val" if key <= found.threshold else "train", item


def _document(item: Conversation | Rejection) -> Document | Rejection:
    return item if isinstance(item, Rejection) else item.document


class _PretrainingSplit(NamedTuple):
    """How the documents of pretraining were parted."""

    validation_fraction: float
    seed: int
    threshold: int | None
    """The largest digest of what was held out; None if that is not known."""


def _pretraining_split(config: RunConfig, out: Path) -> _PretrainingSplit:
    if (out / "data" / FILE_NAME).is_file():
        manifest = Manifest.load(out / "data")
        data = manifest.prepared(config.data)
        return _PretrainingSplit(data.validation_fraction, data.seed, threshold_of(manifest))
    base = out / "checkpoints" / BASE / "step-0" / "state.json"
    saved = read_json_object(base).get("split") if base.is_file() else None
    match saved:
        case {"validation_fraction": float(fraction), "seed": int(seed), "held_out_up_to": str(threshold)}:
            return _PretrainingSplit(fraction, seed, int(threshold, 16))
        case None:
            return _PretrainingSplit(config.data.validation_fraction, config.data.seed, None)
        case _:
            raise InputError(f"{base}: split={saved!r:.80} does not say what was held out")


def split_of(manifest: Manifest) -> dict[str, Any]:
    """How the documents of pretraining were parted, as JSON has it. Raises InputError as :func:`threshold_of`."""
    data = manifest.prepared(DataConfig())
    threshold = f"{threshold_of(manifest):x}"
    return {"validation_fraction": data.validation_fraction, "seed": data.seed, "held_out_up_to": threshold}


def threshold_of(manifest: Manifest) -> int:
    """Up to which digest documents were held out. Raises InputError if that cannot be found any more."""
    if HELD_OUT in manifest.settings:
        return int(manifest.settings[HELD_OUT], 16)
    # Data of an earlier version does not say.
    data = manifest.prepared(DataConfig())
    return survey(read_corpus(data.sources), data.validation_fraction, data.seed).threshold
