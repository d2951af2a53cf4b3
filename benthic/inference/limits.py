"""What an engine takes on, and what it refuses before any work is done."""

from collections.abc import Sequence
from typing import TypedDict

from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.inference.paged_cache import PAGE, pages_for
from benthic.inference.request import Sampling
from benthic.precision.latents import CACHE_DTYPES, CachePrecision
from benthic.precision.quantise import PRECISIONS, Precision


class Options(TypedDict, total=False):
    """How much an engine takes on; what is not given is as :class:`benthic.inference.scheduler.Scheduler` has it."""

    cache_gib: float
    max_batch: int
    max_draft: int
    precision: Precision | None
    cache_precision: CachePrecision | None


def check_options(
    max_batch: int, max_draft: int, precision: Precision | None, cache_precision: CachePrecision | None
) -> None:
    """Raises ``InputError`` if one is wrong."""
    for name, value, least in (("max_batch", max_batch, 1), ("max_draft", max_draft, 0)):
        if value < least:
            raise InputError(f"{name}={value}: must be at least {least}")
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
    if cache_precision not in (None, *CACHE_DTYPES):
        raise InputError(f"cache_precision={cache_precision}: must be one of {', '.join(CACHE_DTYPES)}")


def chunk_length(config: ModelConfig) -> int:
    """Tokens of a prompt that are read at once and shared as one: an eighth of the longest text, 64 to 512."""
    return min(max(config.max_position_embeddings // 8 // PAGE, 1) * PAGE, 512)


def text_limit(config: ModelConfig, ids: Sequence[int], sampling: Sampling, pages: int) -> int:
    """Tokens that a prompt and its answer have at most together.

    Args:
        config: of the model.
        ids: the prompt.
        sampling: its settings.
        pages: of the whole cache.

    Raises:
        InputError: the prompt is empty, too long for the model or the cache, or it or a setting names a token that the
            model does not know.
    """
    _check_ids(config, ids, sampling)
    limit = min(len(ids) + sampling.max_new_tokens, config.max_position_embeddings)
    needed = pages_for(limit - 1)  # the last token is never read
    if needed > pages:
        raise InputError(
            f"prompt: {len(ids)} tokens and max_new_tokens={limit - len(ids)} take {needed} pages of {PAGE} "
            f"tokens; the cache has {pages}: ask for fewer tokens, or start with a larger cache_gib"
        )
    return limit


def _check_ids(config: ModelConfig, ids: Sequence[int], sampling: Sampling) -> None:
    if not ids:
        raise InputError("prompt: must not be empty")
    if len(ids) >= config.max_position_embeddings:
        raise InputError(
            f"prompt: {len(ids)} tokens; must be fewer than max_position_embeddings={config.max_position_embeddings}"
        )
    named = {"prompt": ids, "logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < config.vocab_size:
                raise InputError(f"{name}: token id {token}; must be from 0 to {config.vocab_size - 1}")
