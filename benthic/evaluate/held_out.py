"""All that is measured on the text a run has held out, and how it is told."""

from collections.abc import Iterator
from dataclasses import dataclass

from benthic.config.schema import RunConfig
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import bits_per_byte, xz_baseline
from benthic.evaluate.precision_loss import PrecisionLoss, cache_loss, precision_loss
from benthic.evaluate.score import Score
from benthic.model import LanguageModel
from benthic.precision.latents import CachePrecision
from benthic.precision.quantise import Precision


@dataclass(frozen=True)
class HeldOut:
    """Bits per byte, and beside it what was asked for besides."""

    score: Score
    xz: Score | None
    loss: PrecisionLoss | None
    precision: Precision | None
    cache_loss: PrecisionLoss | None
    cache_precision: CachePrecision | None

    @property
    def scores(self) -> dict[str, Score]:
        """By the names that ``benthic eval --json`` has."""
        scores = {"validation": self.score}
        if self.xz:
            scores["xz_baseline"] = self.xz
        if self.loss:
            scores[f"validation_{self.precision}"] = self.loss.bits_per_byte
            scores[f"greedy_agreement_{self.precision}"] = self.loss.greedy_agreement
        if self.cache_loss:
            scores[f"validation_cache_{self.cache_precision}"] = self.cache_loss.bits_per_byte
            scores[f"greedy_agreement_cache_{self.cache_precision}"] = self.cache_loss.greedy_agreement
        return scores

    def in_words(self) -> Iterator[str]:
        """A line each."""
        value, ci95 = self.score.value, self.score.ci95
        interval = f", 95% interval {ci95[0]:.4f} to {ci95[1]:.4f}" if ci95 else ""
        yield f"{value:.4f} bits per byte of held-out text{interval}"
        if self.xz:
            ratio = value / self.xz.value
            yield f"{self.xz.value:.4f} for xz -9e, with the training text before it; the ratio is {ratio:.3f}"
        losses = {f"weights in {self.precision}": self.loss, f"the cache in {self.cache_precision}": self.cache_loss}
        for what, loss in losses.items():
            if loss:
                rounded, same = loss.bits_per_byte.value, loss.greedy_agreement.value
                yield f"{rounded:.4f} with {what}, {rounded - value:+.4f}; {same:.2%} of favourites stay"


def held_out(
    model: LanguageModel, store: TokenStore, config: RunConfig, *, baseline: bool = False,
    precision: Precision | None = None, cache_precision: CachePrecision | None = None,
) -> HeldOut:  # fmt: skip
    """Measures a model, whose weights are then rounded in place if a precision is asked for.

    Args:
        model: of the run.
        store: its validation split.
        config: its settings, of the stage it has reached.
        baseline: also what ``xz -9e`` makes of the text.
        precision: also with weights kept in this.
        cache_precision: also with latents cached in this, and weights as they are.

    Raises:
        InputError: as :func:`~benthic.evaluate.bits_per_byte.bits_per_byte` and
            :func:`~benthic.data.xz_baseline.xz_bits_per_byte`.
    """
    length, mask = config.train.sequence_length, config.data.mask_documents
    score = bits_per_byte(model, store, sequence_length=length, mask_documents=mask)
    xz = xz_baseline(config.data, store) if baseline else None
    of_cache = of_weights = None
    if cache_precision:  # before the weights are rounded
        of_cache = cache_loss(model, store, cache_precision, sequence_length=length, mask_documents=mask)
    if precision:
        of_weights = precision_loss(model, store, precision, sequence_length=length, mask_documents=mask)
    return HeldOut(score, xz, of_weights, precision, of_cache, cache_precision)
