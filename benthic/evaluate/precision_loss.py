"""What keeping weights or latents in fewer bits costs: bits per byte, and how often the likeliest token is another.

Shapes: B sequences, S tokens, T = S - 1 predictions, C latent, R rope width, L = C + R.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benthic.data.batches import Batch, validation_batches
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import PIECE, bits_per_byte
from benthic.evaluate.score import Score, ratio_score
from benthic.inference.weights import blocks_of, round_weights
from benthic.model import LanguageModel
from benthic.ops.cross_entropy import IGNORE
from benthic.precision.latents import CACHE_DTYPES, CachePrecision, LatentFormat
from benthic.precision.quantise import Precision
from benthic.train.objective import prediction_targets


@dataclass(frozen=True)
class PrecisionLoss:
    """What the rounded model scores."""

    bits_per_byte: Score
    greedy_agreement: Score
    """Share of tokens for which its favourite is that of the model before."""


def precision_loss(
    model: LanguageModel, store: TokenStore, precision: Precision, *, sequence_length: int, mask_documents: bool = False
) -> PrecisionLoss:
    """Round a model's weights, in place, and compare it with what it was. Arguments as for ``bits_per_byte``.

    Activations stay as they are; native decoding in ``int8`` and ``int4`` rounds them to 8 bits besides.
    """
    before = list(_all_choices(model, store, sequence_length, mask_documents))
    round_weights(model, precision)
    return _compared(before, model, store, sequence_length, mask_documents)


def cache_loss(
    model: LanguageModel, store: TokenStore, precision: CachePrecision, *, sequence_length: int,
    mask_documents: bool = False,
) -> PrecisionLoss:  # fmt: skip
    """Compare a model with itself where every token attends to latents as the cache gives them back.

    So does decoding; the first chunk of a prompt is read with latents as they were. Arguments as for ``bits_per_byte``.
    """
    before = list(_all_choices(model, store, sequence_length, mask_documents))
    with _latents_in(model, precision):
        return _compared(before, model, store, sequence_length, mask_documents)


@contextmanager
def _latents_in(model: LanguageModel, precision: CachePrecision) -> Iterator[None]:
    """Within it, the model attends to latents as they are once they have been cached."""
    kept = LatentFormat(model.config, CACHE_DTYPES[precision])
    sizes = (model.config.kv_lora_rank, model.config.qk_rope_head_dim)

    def rounded(module: nn.Module, inputs: object, latents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latent_BTC, rope_BTR = kept.rounded(torch.cat(latents, -1)).split(sizes, -1)
        return latent_BTC, rope_BTR

    with ExitStack() as hooks:
        for block in blocks_of(model):
            hooks.callback(block.attention.kept.register_forward_hook(rounded).remove)
        yield


def _compared(
    before: list[Tensor], model: LanguageModel, store: TokenStore, sequence_length: int, mask_documents: bool
) -> PrecisionLoss:
    """What the model scores, and how often it chooses as ``before``."""
    after = _all_choices(model, store, sequence_length, mask_documents)
    agreed = np.array([(int((a == b).sum()), len(a)) for a, b in zip(before, after, strict=True)], dtype=float)
    same_N, tokens_N = agreed.T
    return PrecisionLoss(
        bits_per_byte(model, store, sequence_length=sequence_length, mask_documents=mask_documents),
        ratio_score("greedy_agreement", same_N, tokens_N),
    )


def _all_choices(
    model: LanguageModel, store: TokenStore, sequence_length: int, mask_documents: bool
) -> Iterator[Tensor]:
    """The likeliest tokens of each batch."""
    batches = validation_batches(store, PIECE, sequence_length, mask_documents=mask_documents)
    return (_choices(model, batch) for batch in batches)


@torch.inference_mode()
def _choices(model: LanguageModel, batch: Batch) -> Tensor:
    """The likeliest token at each position that has one to predict."""
    document_BT = None if batch.document_BS is None else batch.document_BS[:, :-1]
    logits_BTV = model(batch.tokens_BS[:, :-1], document_BT=document_BT)
    counted_BT = prediction_targets(batch.tokens_BS, batch.document_BS, 1)[0] != IGNORE
    choice_N: Tensor = logits_BTV.argmax(-1)[counted_BT].int()
    return choice_N
