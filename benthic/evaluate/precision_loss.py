"""What keeping weights in fewer bits costs: bits per byte, and how often the likeliest token is another.

Shapes: B sequences, S tokens, T = S - 1 predictions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benthic.data.batches import Batch, validation_batches
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import PIECE, bits_per_byte
from benthic.evaluate.score import Score, ratio_score
from benthic.inference.weights import round_weights
from benthic.model import LanguageModel
from benthic.ops.cross_entropy import IGNORE
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

    def choices() -> Iterator[Tensor]:
        batches = validation_batches(store, PIECE, sequence_length, mask_documents=mask_documents)
        return (_choices(model, batch) for batch in batches)

    before = list(choices())
    round_weights(model, precision)
    agreed = np.array([(int((a == b).sum()), len(a)) for a, b in zip(before, choices(), strict=True)], dtype=float)
    same_N, tokens_N = agreed.T
    return PrecisionLoss(
        bits_per_byte(model, store, sequence_length=sequence_length, mask_documents=mask_documents),
        ratio_score("greedy_agreement", same_N, tokens_N),
    )


@torch.inference_mode()
def _choices(model: LanguageModel, batch: Batch) -> Tensor:
    """The likeliest token at each position that has one to predict."""
    document_BT = None if batch.document_BS is None else batch.document_BS[:, :-1]
    logits_BTV = model(batch.tokens_BS[:, :-1], document_BT=document_BT)
    counted_BT = prediction_targets(batch.tokens_BS, batch.document_BS, 1)[0] != IGNORE
    choice_N: Tensor = logits_BTV.argmax(-1)[counted_BT].int()
    return choice_N
