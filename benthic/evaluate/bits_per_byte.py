"""Bits per byte of a run's held-out text, with how sure one may be of it."""

import math

import numpy as np

from benthic.config.schema import DataConfig
from benthic.data.batches import validation_batches
from benthic.data.shards import TokenStore
from benthic.data.xz_baseline import xz_bits_per_byte
from benthic.errors import InputError
from benthic.evaluate.score import Score, ratio_score
from benthic.model import LanguageModel
from benthic.train.validate import nats_of_batches

PIECE = 8
"""Sequences read together, and drawn together by the bootstrap: neighbours may come from one document."""


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
    bytes_a_token = store.manifest.val.bytes / tokens_N.sum()
    return ratio_score("bits_per_byte", nats_N / math.log(2), tokens_N * bytes_a_token)


def xz_baseline(config: DataConfig, store: TokenStore) -> Score:
    """What ``xz -9e`` needs for the same text: one stream, so without an interval. Raises as ``xz_bits_per_byte``."""
    return Score("bits_per_byte", xz_bits_per_byte(config, store.manifest), 1, None)
