"""The text that tells whether a model forgets how to talk while it learns from rewards.

The answers that fine-tuning held out, or else the text that pretraining did, in this run or in the one that it began
with; where there is neither, the prompts of problems that are held out.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch, validation_batches
from benthic.data.chat import ChatFormat
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.posttrain.packing import AnswerStore, in_order
from benthic.posttrain.prepared import prepared_store
from benthic.posttrain.problems import Problem
from benthic.posttrain.sft_data import FOLDER
from benthic.train.probe import PROBED_TOKENS, probe_batches
from benthic.train.state import TrainState
from benthic.train.validate import bits_per_byte_of
from benthic.train.work import Validation

_AT_ONCE = 16
"""Sequences that are read together."""


class HeldOut(NamedTuple):
    """Some text, in batches."""

    measure: str
    """What bits per byte of it are called."""
    key: str
    """The same, in metrics."""
    batches: Callable[[int | None, int], Iterable[Batch]]
    """Of about so many tokens, or all, with so many tokens of lookahead."""
    predicted: int
    """Tokens that are predicted in all of it."""
    size: int
    """Bytes of all of it."""

    def validate(self, state: TrainState, max_tokens: int | None) -> Validation:
        """Bits per byte of about so many tokens, or all, and how often each prediction is right."""
        found = bits_per_byte_of(state.model, self.batches(max_tokens, 1), self.predicted, self.size)
        probed = probe_batches(state.model, self.batches(PROBED_TOKENS, 1 + len(state.model.mtp)))
        return Validation(found, {self.key: found, **probed._asdict()})


def find_held_out(config: RunConfig, out: Path, tokenizer: Tokenizer, problems: Sequence[Problem]) -> HeldOut:
    """What there is for a run in ``out``; ``problems`` are those held out. Raises InputError if it is damaged."""
    for name, read in ((FOLDER, _answers), ("data", _documents)):
        if store := prepared_store(config, out, name, "val", tokenizer):
            return read(store, config, tokenizer)
    return _prompts(problems, tokenizer)


def _documents(store: TokenStore, config: RunConfig, tokenizer: Tokenizer) -> HeldOut:
    mask, length = config.data.mask_documents, config.train.sequence_length

    def batches(max_tokens: int | None, lookahead: int) -> Iterable[Batch]:
        return validation_batches(store, _AT_ONCE, length, mask_documents=mask, max_tokens=max_tokens)

    val = store.manifest.val
    predicted = store.tokens - (val.documents if mask else 1)
    return HeldOut("bits per byte of held-out text", "validation_bits_per_byte", batches, predicted, val.bytes)


def _answers(store: TokenStore, config: RunConfig, tokenizer: Tokenizer) -> HeldOut:
    answers = AnswerStore(store)
    length = max(config.train.sequence_length, int(answers.lengths.max()))

    def batches(max_tokens: int | None, lookahead: int) -> Iterable[Batch]:
        return in_order(answers, length, lookahead, _AT_ONCE, tokenizer.eos_id, max_tokens)

    measure, predicted = "bits per byte of held-out answers", answers.answer_tokens()
    return HeldOut(measure, "answer_bits_per_byte", batches, predicted, store.manifest.val.bytes)


def _prompts(problems: Sequence[Problem], tokenizer: Tokenizer) -> HeldOut:
    chat = ChatFormat(tokenizer)
    ids = [chat.prompt(problem.messages) for problem in problems]
    texts: list[Any] = [message["content"] for problem in problems for message in problem.messages]

    def batches(max_tokens: int | None, lookahead: int) -> Iterable[Batch]:
        total = 0
        for start in range(0, len(ids), _AT_ONCE):
            if max_tokens is None or total < max_tokens:
                part = ids[start : start + _AT_ONCE]
                total += sum(map(len, part))
                yield _padded(part, lookahead, tokenizer.eos_id)

    size = sum(len(text.encode()) for text in texts)
    predicted = sum(map(len, ids)) - len(ids)
    return HeldOut("bits per byte of held-out prompts", "validation_bits_per_byte", batches, predicted, size)


def _padded(sequences: Sequence[Sequence[int]], lookahead: int, padding: int) -> Batch:
    shape = len(sequences), max(map(len, sequences)) - 1 + lookahead
    tokens_BS, document_BS = torch.full(shape, padding), torch.full(shape, -1)
    for row, ids in enumerate(sequences):
        tokens_BS[row, : len(ids)], document_BS[row, : len(ids)] = torch.tensor(ids), 0
    return Batch(tokens_BS, document_BS, document_BS == 0)
