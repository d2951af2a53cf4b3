"""Did extending the context work? Bits per byte by position, before and after, and the verdict in figures.

YaRN is checked where the promise is made: at a multiple of the pretrained length. Without it positions beyond that
length are new to the model, and bits per byte there blow up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benthic.config.schema import YarnConfig
from benthic.errors import InputError
from benthic.evaluate.by_position import nats_by_position
from benthic.evaluate.score import Score, ratio_score
from benthic.model import LanguageModel, build_model

TIMES = 4
"""The multiple of the pretrained length that is looked at."""


@dataclass(frozen=True)
class ByPosition:
    """Bits per byte of one model over the same held-out sequences of ``TIMES`` times the pretrained length."""

    within: Score
    """At positions up to the pretrained length."""
    beyond: Score
    """At positions of the last half: from ``TIMES / 2`` to ``TIMES`` times the pretrained length."""
    last_read_short: Score
    """Of the last tokens of each sequence, where only the pretrained length before its end is read."""
    last_read_long: Score
    """Of the same tokens, where all of it is read."""

    @property
    def ratio(self) -> float:
        """Bits per byte beyond the pretrained length over those within."""
        return self.beyond.value / self.within.value


@dataclass(frozen=True)
class ContextExtension:
    """What the report shows of context extension."""

    pretrained_length: int
    length: int
    extended: ByPosition
    """With YaRN, after its training."""
    unextended: ByPosition
    """As pretraining left it, without YaRN."""

    @property
    def holds(self) -> bool:
        """With YaRN, bits per byte at the long length are no worse than at the pretrained one."""
        return self.extended.beyond.value <= self.extended.within.value

    @property
    def blows_up(self) -> bool:
        """Without it they are worse, and worse than with it by more than their intervals."""
        before, after = self.unextended.beyond, self.extended.beyond
        apart = before.ci95 is not None and after.ci95 is not None and before.ci95[0] > after.ci95[1]
        return self.unextended.ratio > 1 and apart

    def in_words(self) -> list[str]:
        """The verdict, a line each."""
        short, long = self.pretrained_length, self.length
        after, before = self.extended, self.unextended
        return [
            f"with YaRN {after.beyond.value:.3f} bits per byte at {long // 2}-{long} tokens, {after.within.value:.3f} "
            f"at 0-{short}: {'no worse' if self.holds else 'worse'}",
            f"without it {before.beyond.value:.3f} at {long // 2}-{long}, {before.within.value:.3f} at 0-{short}: "
            f"{'it blows up' if self.blows_up else 'no blow-up is shown'}",
            f"the last tokens of {long}, with YaRN: {after.last_read_long.value:.3f} with all of them read, "
            f"{after.last_read_short.value:.3f} with the last {short}",
        ]


def context_extension(
    extended: LanguageModel, unextended: LanguageModel, tokens_BS: Tensor, *, pretrained_length: int,
    bytes_a_token: float, progress: Callable[[int, int], None] = lambda done, total: None,
) -> ContextExtension:  # fmt: skip
    """Measures both models on the same sequences.

    Args:
        extended: with YaRN, trained at its length.
        unextended: the model that pretraining left.
        tokens_BS: held-out sequences of ``TIMES * pretrained_length`` tokens, and one more to predict.
        pretrained_length: tokens of a sequence in pretraining.
        bytes_a_token: of the held-out text.
        progress: told of the sequences read.

    Raises:
        InputError: the sequences have another length.
    """
    length = TIMES * pretrained_length
    if tokens_BS.shape[1] != length + 1:
        raise InputError(f"sequences of {tokens_BS.shape[1]} tokens; {length + 1} are needed, one to be predicted")
    count = len(tokens_BS)
    found = []
    for model, before in ((extended, 0), (unextended, count)):

        def report(done: int, _: int, before: int = before) -> None:
            progress(before + done, 2 * count)

        found.append(by_position(read(model, tokens_BS, pretrained_length, report), bytes_a_token))
    return ContextExtension(pretrained_length, length, *found)


class Read(NamedTuple):
    """Nats of the tokens of some sequences, each sequence a row."""

    long_BT: Tensor
    """Of all tokens."""
    short_BT: Tensor
    """Of the last ones, as many as pretraining read at a time, where nothing before them is read."""


def read(model: LanguageModel, tokens_BS: Tensor, pretrained_length: int, progress: Callable[[int, int], None]) -> Read:
    """What a model makes of sequences, a token longer than is read; ``progress`` is told of those read."""
    long, short = [], []
    for number, tokens_1S in enumerate(tokens_BS.split(1), start=1):
        long.append(nats_by_position(model, [tokens_1S]))
        short.append(nats_by_position(model, [tokens_1S[:, -pretrained_length - 1 :]]))
        progress(number, len(tokens_BS))
    return Read(torch.stack(long), torch.stack(short))


def by_position(found: Read, bytes_a_token: float) -> ByPosition:
    """Bits per byte by where in a sequence tokens stand, and by how much was read before the last."""
    long_BT, short_BT = found
    pretrained, length = short_BT.shape[1], long_BT.shape[1]
    last = max(1, pretrained // 2)
    parts = (long_BT[:, :pretrained], long_BT[:, length // 2 :], short_BT[:, -last:], long_BT[:, -last:])
    return ByPosition(*(_bits_per_byte(part, bytes_a_token) for part in parts))


def _bits_per_byte(nats_BT: Tensor, bytes_a_token: float) -> Score:
    bits_B = nats_BT.sum(1).numpy() / math.log(2)
    return ratio_score("bits_per_byte", bits_B, np.full(len(bits_B), nats_BT.shape[1] * bytes_a_token))


def as_long(model: LanguageModel, length: int, *, yarn: bool) -> LanguageModel:
    """The model with the same weights, taking texts of ``length``.

    Args:
        model: left as it is.
        length: tokens.
        yarn: stretch its positions to that length (arXiv 2309.00071), from the one it was pretrained at.
    """
    changes: dict[str, object] = {"max_position_embeddings": length}
    if yarn:
        scaling = model.config.rope_scaling
        original = scaling.original_max_position_embeddings if scaling else model.config.max_position_embeddings
        changes["rope_scaling"] = YarnConfig(
            factor=max(1.0, length / original), original_max_position_embeddings=original
        )
    longer = build_model(model.config.model_copy(update=changes), device="meta")
    longer.load_state_dict(model.state_dict(), assign=True)
    return longer.eval()
