"""Choosing the next token from its logits, in a way that depends on nothing but settings, seed and position.

A token is drawn by the Gumbel-max trick (arXiv 1611.01144, section 2.1) in its exponential form: each token's
probability is divided by noise of its own and the largest quotient wins, which draws exactly from the distribution. The
noise comes from a counter-based generator keyed by the request's seed and the token's position. So a request's text
does not depend on what else runs, on whether it was preempted, or on how many tokens were drafted ahead of it: a draft
is a guess at this one outcome, made with the same noise, and right or wrong (drafter-invariant speculative decoding,
arXiv 2408.07978). Rejection sampling with fresh randomness would also keep the distribution, but the text would change
with the drafts.

Legend: V vocabulary.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benthic.errors import WorkFailed
from benthic.inference.request import Sampling, TopLogprobs

IntArray = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

_FIRST_SIZES = (64, 1024)
"""So many of the likeliest tokens are looked at in turn, before all are sorted, for one where the cut-off lies."""
_LARGEST = torch.finfo(torch.float32).max
_COLD = 1e-6
"""Below this temperature the likeliest token is taken: what is left of others' probabilities rounds to nothing."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Logits:
    """A row of logits in fp32 and what every token chosen from it asks for."""

    values_V: npt.NDArray[np.float32]
    best: int
    """The first of the largest."""
    peak: float
    """The largest."""
    log_sum: float
    """The logarithm of the sum of exponentials measured from it; not finite if a logit is not."""

    @classmethod
    def of(cls, logits_V: Tensor) -> Self:
        """By PyTorch, from logits on the CPU."""
        peak_V = logits_V.max()
        log_sum = float((logits_V - peak_V).logsumexp(0))
        return cls(logits_V.numpy(), int(logits_V.numpy().argmax()), float(peak_V), log_sum)

    def logprob(self, token: int) -> float:
        """Log-probability of a token."""
        return float(self.values_V[token]) - self.peak - self.log_sum

    def top(self, count: int) -> TopLogprobs:
        """The likeliest tokens with their log-probabilities."""
        if not count:
            return ()
        tokens = torch.from_numpy(self.values_V).topk(min(count, len(self.values_V))).indices.tolist()
        return tuple((token, self.logprob(token)) for token in tokens)


def distribution(logits_V: Tensor, settings: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens (K,) that may come next and their probabilities (K,) in float32, which sum to 1.

    ``temperature`` 0, or next to it, leaves the likeliest alone. ``top_k`` keeps the k likeliest (0 keeps all);
    ``top_p`` then keeps the fewest likeliest whose probabilities reach that sum (nucleus sampling, arXiv 1904.09751,
    section 3.1), never fewer than one; ``min_p`` then those at least as likely as this share of the likeliest (arXiv
    2407.01082).
    """
    if settings.temperature < _COLD:
        return logits_V.argmax(0, keepdim=True), torch.ones(1)
    logits_V = logits_V.float()
    # Measured from the largest, a logit over a tiny temperature falls to minus infinity instead of overflowing.
    scaled_V = (logits_V - logits_V.max()) / settings.temperature
    if 0 < settings.top_k < len(scaled_V):
        values_K, index_K = scaled_V.topk(settings.top_k)
        return _cut(values_K.softmax(0), index_K, settings)
    probability_V = scaled_V.softmax(0)
    if settings.top_p == 1 and settings.min_p == 0:
        return torch.arange(len(probability_V)), probability_V
    for size in _FIRST_SIZES:
        values_K, index_K = probability_V.topk(min(size, len(probability_V)))
        if values_K.sum() > settings.top_p or values_K[-1] < settings.min_p * values_K[0]:
            return _cut(values_K, index_K, settings)
    return _cut(*probability_V.sort(descending=True, stable=True), settings)


def pick(tokens_K: Tensor, probability_K: Tensor, seed: int, position: int) -> int:
    """A token drawn from the distribution with the noise of this seed and position."""
    tokens, probability = tokens_K.numpy(), probability_K.numpy()
    return int(tokens[(probability / exponential_noise(seed, position, tokens)).argmax()])


def exponential_noise(seed: int, position: int, tokens_K: IntArray) -> FloatArray:
    """Exponentially distributed noise (K,), a pure function of seed, position and token.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): the stream of one
    position starts where seed and position are mixed to, and a token's number is its place in the stream.
    """
    start = _mix(_mix(np.array([seed], np.uint64)) + np.array([position], np.uint64) * _GOLDEN)
    bits_K = _mix(start + (tokens_K.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    uniform_K = (bits_K >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # Never 0, so that no quotient is infinite.
    noise_K: FloatArray = np.maximum(-np.log1p(-uniform_K), 2.0**-60)
    return noise_K


def _mix(x: IntArray) -> IntArray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: IntArray = x ^ (x >> np.uint64(31))
    return mixed


def log_probabilities(logits_V: Tensor) -> Tensor:
    """Log-probabilities (V,), in float32 at least."""
    return logits_V.log_softmax(dim=0, dtype=torch.promote_types(logits_V.dtype, torch.float32))


def top_of(logprobs_V: Tensor, count: int) -> TopLogprobs:
    """The likeliest tokens with their log-probabilities."""
    if not count:
        return ()
    top = logprobs_V.topk(min(count, len(logprobs_V)))
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


class Sampler:
    """Chooses the tokens of one request: settings, what has been said so far, and the noise of its seed."""

    def __init__(self, settings: Sampling, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self._settings, self._vocab_size = settings, vocab_size
        self._seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self._constraint = settings.constraint
        self._bias_V = _bias(settings, vocab_size)
        self._counts_V: Tensor | None = None
        self._seen_V: Tensor | None = None
        if settings.presence_penalty or settings.frequency_penalty:
            self._counts_V = torch.zeros(vocab_size)
        if settings.repetition_penalty != 1:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen_V[list(prompt_ids)] = True
        changing = (self._constraint, self._bias_V, self._counts_V, self._seen_V)
        self.takes_likeliest = settings.temperature < _COLD and all(part is None for part in changing)
        """Whether the likeliest token is taken whatever came before."""

    def choose(self, logits: Logits, position: int) -> int | None:
        """The token at ``position``; None if the constraint allows none.

        Raises:
            WorkFailed: a logit is NaN or plus infinity, or all are minus infinity, as damaged weights make them.
        """
        if not math.isfinite(logits.log_sum):
            raise WorkFailed("the model's logits are not finite: its weights are damaged, or its precision is too low")
        if self.takes_likeliest:
            return logits.best
        logits_V = self._adjusted(torch.from_numpy(logits.values_V))
        if self._constraint is not None:
            allowed_V = unpacked(self._constraint.mask(self._vocab_size), self._vocab_size)
            if not allowed_V.any():
                return None
            logits_V = logits_V.masked_fill(~allowed_V, float("-inf"))
        return self._draw(logits_V, position)

    def guess(self, logits_V: Tensor, position: int) -> int:
        """What :meth:`choose` would give at ``position`` if these were the model's logits; penalties lag behind.

        Of logits that are not finite, any: a guess decides nothing.
        """
        if not math.isfinite(float(logits_V.max())):
            return 0
        return self._draw(self._adjusted(logits_V), position)

    def accept(self, token: int) -> None:
        """This token has been chosen, and joins the text or ends it."""
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._constraint is not None:
            self._constraint.accept(token)

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """Logits after bias and penalties."""
        settings = self._settings
        if self._bias_V is not None:
            logits_V = logits_V.float() + self._bias_V
        if self._seen_V is not None:
            penalty, exact_V = settings.repetition_penalty, logits_V.float()
            lowered_V = torch.where(exact_V > 0, exact_V / penalty, exact_V * penalty).clamp(max=_LARGEST)
            logits_V = torch.where(self._seen_V, lowered_V, exact_V)
        if self._counts_V is not None:
            logits_V = logits_V.float() - settings.frequency_penalty * self._counts_V
            logits_V = logits_V - settings.presence_penalty * (self._counts_V > 0)
        return logits_V

    def _draw(self, logits_V: Tensor, position: int) -> int:
        if self._settings.temperature < _COLD:
            return int(logits_V.numpy().argmax())
        return pick(*distribution(logits_V, self._settings), self._seed, position)


def unpacked(mask: Tensor, vocab_size: int) -> Tensor:
    """A constraint's mask as bool (V,)."""
    if mask.dtype == torch.bool:
        return mask
    bits = np.unpackbits(mask.cpu().numpy().view(np.uint8), bitorder="little", count=vocab_size)
    return torch.from_numpy(bits).bool()


def _bias(settings: Sampling, vocab_size: int) -> Tensor | None:
    if not settings.logit_bias:
        return None
    bias_V = torch.zeros(vocab_size)
    for token, value in settings.logit_bias.items():
        bias_V[token] = value
    return bias_V


def _cut(probability_K: Tensor, tokens_K: Tensor, settings: Sampling) -> tuple[Tensor, Tensor]:
    """What ``top_p`` and ``min_p`` leave of tokens in order of probability."""
    likelier_K = probability_K.cumsum(0) - probability_K
    kept_K = (likelier_K < settings.top_p) & (probability_K >= settings.min_p * probability_K[0])
    count = max(1, int(kept_K.sum()))
    return tokens_K[:count], probability_K[:count] / probability_K[:count].sum()
