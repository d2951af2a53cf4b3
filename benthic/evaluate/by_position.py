"""What each position of a sequence costs a model: whether it makes use of text that lies further back.

Shapes: B sequences, S = T + 1 tokens, T positions, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from benthic.model import LanguageModel


@torch.no_grad()
def nats_by_position(model: LanguageModel, sequences: Iterable[Tensor]) -> Tensor:
    """Mean nats (T,), in float64, that the model needs for the token after each position.

    Args:
        model: any, in evaluation or training mode.
        sequences: token ids (B, S) of one length S, with one token of lookahead.
    """
    sums: list[Tensor] = []
    count = 0
    for tokens_BS in sequences:
        # A sequence at a time: the logits of a long one are large enough.
        for tokens_S in tokens_BS:
            logits_TV = model(tokens_S[None, :-1])[0].float()
            sums.append(F.cross_entropy(logits_TV, tokens_S[1:], reduction="none").double())
            count += 1
    return torch.stack(sums).sum(0) / count
