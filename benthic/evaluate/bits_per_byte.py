"""Bits per byte of a run's held-out text, with how sure one may be of it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benthic.config.schema import DataConfig
from benthic.data.batches import validation_batches
from benthic.data.shards import TokenStore
from benthic.data.xz_baseline import xz_bits_per_byte
from benthic.errors import InputError
from benthic.model import LanguageModel
from benthic.train.validate import nats_of_batches

RESAMPLES = 1000
PIECE = 8
"""Sequences read together, and drawn together by the bootstrap: neighbours may come from one document."""


@dataclass(frozen=True)
class Score:
    """A task's outcome; its fields are the keys of ``benthic eval --json``."""

    metric: str
    value: float
    n: int
    """Independent pieces the value is an average of: here, of eight sequences each."""
    ci95: tuple[float, float] | None
    """95% confidence interval, by bootstrap over the pieces; none of a single piece."""


def bits_per_byte(
    model: LanguageModel, store: TokenStore, *, sequence_length: int, mask_documents: bool = False
) -> Score:
    """Bits the model needs for a byte of a split, every token of it predicted once.

    Args:
        model: in evaluation or training mode, which is one for these models.
        store: the validation split.
        sequence_length: tokens that are read together, as in training.
        mask_documents: keep attention within documents, as in training.

    Raises:
        InputError: the text was prepared for a larger vocabulary than the model's.
    """
    if store.manifest.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the held-out text has a vocabulary of {store.manifest.vocab_size}, the model one of "
            f"{model.config.vocab_size}: it was prepared for another model"
        )
    batches = validation_batches(store, PIECE, sequence_length, mask_documents=mask_documents)
    nats_N, tokens_N = np.array(list(nats_of_batches(model, batches))).T
    scale = tokens_N.sum() / math.log(2) / store.manifest.val.bytes
    value = float(nats_N.sum() / tokens_N.sum() * scale)
    interval = None
    if len(nats_N) > 1:
        low, high = bootstrap_ci95(nats_N, tokens_N)
        interval = float(low * scale), float(high * scale)
    return Score("bits_per_byte", value, len(nats_N), interval)


def xz_baseline(config: DataConfig, store: TokenStore) -> Score:
    """What ``xz -9e`` needs for the same text: one stream, so without an interval. Raises as ``xz_bits_per_byte``."""
    return Score("bits_per_byte", xz_bits_per_byte(config, store.manifest), 1, None)


def bootstrap_ci95(totals_N: NDArray[np.float64], weights_N: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of ``totals.sum() / weights.sum()`` when the N pieces are drawn anew with replacement."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(totals_N), size=len(totals_N)) for _ in range(RESAMPLES))
    ratios = [totals_N[chosen].sum() / weights_N[chosen].sum() for chosen in draws]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
