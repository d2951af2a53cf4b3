"""Choosing the next token from its logits: temperature, then the k likeliest, then the nucleus."""

import math

import torch
from torch import Tensor

from benthic.errors import WorkFailed


def distribution(logits_V: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities (V,) in float32 from which the next token is drawn.

    ``temperature`` 0 puts everything on the likeliest token. ``top_k`` keeps the k likeliest (0 keeps all);
    ``top_p`` then keeps the fewest likeliest whose probabilities reach that sum (nucleus sampling,
    arXiv 1904.09751, section 3.1), never fewer than one.
    """
    logits_V = logits_V.float()
    if temperature == 0:
        return torch.zeros_like(logits_V).index_fill(0, logits_V.argmax(), 1.0)
    # Measured from the largest, a logit over a tiny temperature falls to minus infinity instead of overflowing.
    scaled_V = (logits_V - logits_V.max()) / temperature
    if 0 < top_k < len(scaled_V):
        kept = scaled_V.topk(top_k)
        scaled_V = torch.full_like(scaled_V, float("-inf")).scatter(0, kept.indices, kept.values)
    probability_V = scaled_V.softmax(dim=0)
    return _nucleus(probability_V, top_p) if top_p < 1 else probability_V


def draw(
    logits_V: Tensor, generator: torch.Generator, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> int:
    """The next token's id; at temperature 0 the generator is left as it is.

    Raises:
        WorkFailed: a logit is NaN or infinite, as damaged weights make them.
    """
    if not math.isfinite(logits_V.max()):
        raise WorkFailed("the model's logits are not finite: its weights are damaged, or its precision is too low")
    if temperature == 0:
        return int(logits_V.argmax())
    probability_V = distribution(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
    return int(torch.multinomial(probability_V.to(generator.device), 1, generator=generator))


def _nucleus(probability_V: Tensor, top_p: float) -> Tensor:
    ordered = probability_V.sort(descending=True, stable=True)
    likelier_V = ordered.values.cumsum(0) - ordered.values
    kept_V = ordered.values.where(likelier_V < top_p, 0.0)
    return torch.zeros_like(probability_V).scatter(0, ordered.indices, kept_V / kept_V.sum())
