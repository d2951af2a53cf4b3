"""Did extending the context work? Bits per byte by position, of a model before and after.

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
