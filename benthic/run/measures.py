"""What is measured of the model that a stage of training has led to, a measure at a time.

Every stage's model is asked the same, and reads the same text at the length that pretraining had, so that figures of
one stage can be laid beside those of another.

Legend: B sequences, S tokens of a sequence, T positions, K predictions (main model, then MTP depths), V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benthic.config.schema import RunConfig
from benthic.config.stages import Stage, stages
from benthic.data.batches import validation_batches
from benthic.data.chat import ChatFormat
from benthic.data.manifest import FILE_NAME
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate.bits_per_byte import PIECE, bits_per_byte
from benthic.evaluate.context_extension import TIMES, as_long, by_position, read
from benthic.evaluate.generation import AHEAD, answers, scores
from benthic.evaluate.records import Curve, Sampled
from benthic.evaluate.retrieval import lengths_from, retrieval
from benthic.evaluate.score import Score, ratio_score, share_score
from benthic.evaluate.task_files import Question, Task, read_tasks
from benthic.evaluate.tasks import MAX_BATCH, evaluate
from benthic.inference.batching import BatchEngine
from benthic.inference.engine import Engine
from benthic.model import LanguageModel
from benthic.posttrain.packing import AnswerStore, in_order
from benthic.posttrain.prepared import prepared
from benthic.posttrain.problem_files import ANSWERED
from benthic.posttrain.problem_files import FOLDER as PROBLEMS_FOLDER
from benthic.posttrain.sft_data import BYTES, SAMPLES
from benthic.posttrain.sft_data import FOLDER as SFT_FOLDER
from benthic.train.validate import nats_of_batches

STRETCHES = 16
"""Into which the positions of a long sequence are parted."""
_AT_ONCE = 512
_FEW_PIECES = 32
_DRAFTED_TOKENS = 16384
"""Of held-out text, that drafts are judged on."""

Report = Callable[[int, int], None]
"""Called with how much is done, and of how much."""
Found = dict[str, Any]
"""Fields of :class:`benthic.evaluate.records.EvaluationRecord`, to be added to those that are there."""


@dataclass(frozen=True)
class Measure:
    """One of the things to find out about a model."""

    name: str
    """Also of the first of its scores, where it gives any."""
    of: Callable[["Subject", Report], Found]


@dataclass
class Subject:
    """The model of a stage, and what it is measured with."""

    run: Path
    config: RunConfig
    """Of the whole run."""
    stage: Stage
    model: LanguageModel

    @property
    def held_out(self) -> TokenStore:
        """The text that the run, or the one it began with, has held out."""
        return TokenStore(prepared(self.config, self.run, "data")[0], "val")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the run."""
        return Tokenizer.load(self.run / "tokenizer")

    @property
    def extended(self) -> bool:
        """Whether the model's context has been extended by this run."""
        return self.model.config.rope_scaling is not None

    @property
    def length(self) -> int:
        """Tokens of a sequence in pretraining."""
        return self.config.train.sequence_length

    def long(self, length: int) -> LanguageModel:
        """The model, reading so far: as it has learnt to, or, if it has not, without further ado."""
        if length <= self.model.config.max_position_embeddings:
            return self.model
        return as_long(self.model, length, yarn=self.extended)


def measures(run: Path, config: RunConfig) -> list[Measure]:
    """All that is measured in a run with these settings and what is prepared in it.

    Raises InputError if a task file cannot be used.
    """
    found: list[Measure] = []
    text = bool(prepared(config, run, "data"))
    if text:
        found += [Measure("validation", _validation), Measure("acceptance", _acceptance)]
    if (run / SFT_FOLDER / FILE_NAME).is_file():
        found += [_answers_of(number, name) for number, name in enumerate(_names_of_answers(run))]
    found += [Measure(task.name, _task(task)) for task in tasks(run, config)]
    if text and extends(config):
        found.append(Measure("by position", _by_position))
        found += [Measure(f"retrieval-{length}", _retrieval(length)) for length in lengths_from(_length(config))]
    return [*found, Measure("samples", _samples)]


def tasks(run: Path, config: RunConfig) -> list[Task]:
    """Problems held out from learning by rewards, and the files that the settings name."""
    own = sorted(path for path in (run / PROBLEMS_FOLDER).glob("*.jsonl") if path.name != ANSWERED)
    return read_tasks([*own, *map(Path, config.evaluation.tasks)])


def extends(config: RunConfig) -> bool:
    """Whether a run with these settings extends the context."""
    return any(stage.name.startswith("extend-") for stage in stages(config))


def _length(config: RunConfig) -> int:
    return stages(config)[0].config.train.sequence_length


# ---------------------------------------------------------------------- held-out text


def _validation(subject: Subject, report: Report) -> Found:
    mask = subject.config.data.mask_documents
    found = bits_per_byte(subject.model, subject.held_out, sequence_length=subject.length, mask_documents=mask)
    return {"scores": {"validation": found}}


def _names_of_answers(run: Path) -> list[str]:
    """Of the sources of conversations: ``answers-chitchat``; of data that does not tell them apart, ``answers``."""
    settings = TokenStore(run / SFT_FOLDER, "val").manifest.settings
    if BYTES not in settings:
        return ["answers"]
    return [f"answers-{Path(source).stem}" for source in settings["sources"]]


def _answers_of(number: int, name: str) -> Measure:
    """Bits per byte of held-out answers of one source."""

    def measure(subject: Subject, report: Report) -> Found:
        store = TokenStore(subject.run / SFT_FOLDER, "val")
        manifest, answers = store.manifest, AnswerStore(store)
        among, size = slice(None), manifest.val.bytes
        if BYTES in manifest.settings:
            counts = manifest.settings[SAMPLES]["val"]
            start = sum(counts[:number])
            among, size = slice(start, start + counts[number]), manifest.settings[BYTES]["val"][number]
        if not size:
            return {"not_measured": {name: "none of its conversations is held out"}}
        length = max(subject.length, int(answers.lengths.max()))
        # Few samples are read one sequence at a time, for an interval needs pieces to draw from.
        at_once = PIECE if int(answers.lengths[among].sum()) > _FEW_PIECES * PIECE * length else 1
        batches = in_order(answers, length, 1, at_once, subject.tokenizer.eos_id, among=among)
        nats_N, tokens_N = np.array(list(nats_of_batches(subject.long(length), batches))).T
        bits_N, bytes_N = nats_N / math.log(2), tokens_N * (size / tokens_N.sum())
        return {"scores": {name: ratio_score("bits_per_byte", bits_N, bytes_N)}}

    return Measure(name, measure)


@torch.no_grad()
def _acceptance(subject: Subject, report: Report) -> Found:
    """How often what an MTP depth drafts is what the model itself would write there, reading held-out text.

    A draft at depth k stands for the token k + 1 after the one that was read last. It is accepted if the main model,
    k positions later, has the same favourite (V3 report section 5.4.3, greedily).
    """
    model, depths = subject.model, len(subject.model.mtp)
    if not depths:
        return {"not_measured": {"acceptance": "the model has no MTP modules"}}
    store, mask = subject.held_out, subject.config.data.mask_documents
    same: list[list[Tensor]] = [[] for _ in range(depths)]
    for batch in validation_batches(
        store, PIECE, subject.length, mask_documents=mask, max_tokens=_DRAFTED_TOKENS
    ):  # fmt: skip
        if batch.tokens_BS.shape[1] > 1 + depths:
            for agreed, found in zip(same, _agreements(model, batch.tokens_BS, batch.document_BS), strict=True):
                agreed.append(found)
    parts = [torch.cat(agreed).double().numpy() for agreed in same if agreed]
    if not parts:
        return {"not_measured": {"acceptance": "the held-out text is too short"}}
    return {"acceptance": [share_score("acceptance", part) for part in parts]}


def _agreements(model: LanguageModel, tokens_BS: Tensor, document_BS: Tensor | None) -> Iterator[Tensor]:
    """By depth: whether the favourites are the same, where all that is read, and what comes next, is one document's."""
    states, _ = model.training_hidden(tokens_BS, document_BS)
    favourites = [_favourites(model, state_BTD) for state_BTD in states]
    for depth in range(1, len(favourites)):
        main_BT, drafted_BT = favourites[0][:, depth:], favourites[depth][:, :-depth]
        same_BT = main_BT == drafted_BT
        if document_BS is None:
            yield same_BT.flatten()
        else:
            length = same_BT.shape[1]
            yield same_BT[document_BS[:, :length] == document_BS[:, depth + 1 : depth + 1 + length]]


def _favourites(model: LanguageModel, state_BTD: Tensor) -> Tensor:
    """The likeliest token (B, T) after each state, a few states at a time, for logits are large."""
    parts = [model.transformer.head(part_ND).argmax(-1) for part_ND in state_BTD.flatten(0, 1).split(_AT_ONCE)]
    return torch.cat(parts).view(state_BTD.shape[:2])


# ---------------------------------------------------------------------- tasks


def _task(task: Task) -> Callable[[Subject, Report], Found]:
    """Scores of a task, and where answers are written, the first of them."""

    def measure(subject: Subject, report: Report) -> Found:
        model, tokenizer = subject.model, subject.tokenizer
        if not isinstance(task.problems[0], Question):
            return {"scores": evaluate(model, tokenizer, [task], lambda _, done, total: report(done, total or 0))}
        with BatchEngine(model, tokenizer, max_queue=AHEAD, max_batch=MAX_BATCH) as engine:
            given = answers(engine, tokenizer, task, report)
        named = {
            f"{task.name}:{score.metric}" if number else task.name: score
            for number, score in enumerate(scores(task, given))
        }
        asked, first = task.problems[0], given[0][0]
        prompt = asked.prompt if asked.prompt is not None else asked.messages[-1].content
        sample = Sampled(prompt=prompt, answer=first.text, wanted=asked.answer[0], score=first.score)
        return {"scores": named, "samples": [sample]}

    return measure


def _samples(subject: Subject, report: Report) -> Found:
    """What the model is likeliest to say to each prompt."""
    tokenizer, settings = subject.tokenizer, subject.config.evaluation
    if tokenizer.chat_template is None:
        return {"not_measured": {"samples": "the model has no chat template"}}
    engine, chat = Engine(subject.model, tokenizer, max_batch=1, cache_gib=0.25), ChatFormat(tokenizer)
    samples = []
    for number, prompt in enumerate(settings.prompts, start=1):
        ids = chat.prompt([{"role": "user", "content": prompt}])
        [found] = engine.generate([ids], temperature=0.0, max_new_tokens=settings.max_new_tokens)
        samples.append(Sampled(prompt=prompt, answer=found.text))
        report(number, len(settings.prompts))
    return {"samples": samples}


# ---------------------------------------------------------------------- long texts


def _by_position(subject: Subject, report: Report) -> Found:
    """Bits per byte along sequences of four times the pretrained length, and of their ends with less text before."""
    store = subject.held_out
    pretrained, length = subject.length, TIMES * subject.length
    batches = validation_batches(store, 1, length, max_tokens=subject.config.evaluation.sequences * length)
    whole = [batch.tokens_BS for batch in batches if batch.tokens_BS.shape[1] == length + 1]
    if not whole:
        why = f"the held-out text has {store.tokens} tokens, not one sequence of {length}"
        return {"not_measured": {"by position": why}}
    bytes_a_token = store.manifest.val.bytes / store.tokens
    found = read(subject.long(length), torch.cat(whole), pretrained, report)
    told = by_position(found, bytes_a_token)
    ends = sorted({length * (number + 1) // STRETCHES for number in range(STRETCHES)} - {0})
    bits_T = found.long_BT.mean(0) / math.log(2) / bytes_a_token
    means = [float(bits_T[start:end].mean()) for start, end in pairwise([0, *ends])]
    curve = Curve(
        name="with YaRN" if subject.extended else "without YaRN", ends=tuple(ends), bits_per_byte=tuple(means)
    )
    named: dict[str, Score] = {
        f"positions 0-{pretrained}": told.within, f"positions {length // 2}-{length}": told.beyond,
        f"last tokens, {pretrained} read": told.last_read_short, f"last tokens, {length} read": told.last_read_long,
    }  # fmt: skip
    return {"scores": named, "by_position": [curve], "pretrained_length": pretrained}


def _retrieval(length: int) -> Callable[[Subject, Report], Found]:
    """Share of facts found in texts of so many tokens."""

    def measure(subject: Subject, report: Report) -> Found:
        store = subject.held_out
        filler = subject.tokenizer.decode(store.take(np.arange(min(store.tokens, 16 * length))).tolist())
        count = subject.config.evaluation.retrieval
        name = f"retrieval-{length}"
        try:
            found = retrieval(
                subject.long(length), subject.tokenizer, filler, lengths=[length], count=count, report=report
            )
        except InputError as error:
            return {"not_measured": {name: str(error)}}
        return {"scores": {name: found[length]}}

    return measure
