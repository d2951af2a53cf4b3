"""Speed of inference here: reading a prompt against the best matrix product, decoding against memory bandwidth.

The weights are random, and so are the tokens and the latents that fill the cache: a step's time hardly depends on
what they are, except that random tokens choose different experts, as text does, and defeat the processor's caches.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.inference.cache import LatentCache
from benthic.inference.huge_pages import use_huge_pages
from benthic.model import Transformer, build_model
from benthic.plan.counts import main_model
from benthic.plan.decode import decode_bytes
from benthic.plan.flops import forward_flops
from benthic.plan.machine import measure_bandwidth_gb_s, measure_gemm_gflops

Precision = Literal["fp32", "bf16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_REPEATS = 7
_DECODE_STEPS = 16
"""Decoded in each repeat, so that one slow moment weighs little."""


@dataclass(frozen=True)
class InferenceSpeed:
    """Fields are the keys of ``benthic bench prefill|decode --json``."""

    tokens_per_s: float
    """Of all sequences together, in the median repeat."""
    context: int
    batch: int
    precision: Precision
    memory_gb_per_s: float
    gemm_gflops: float
    """Both measured in this process; the second in the same precision."""
    share_of_limit: float
    """Least time the work can take, by arithmetic (prefill) or by memory traffic (decode), over the time it took."""
    accepted_per_step: float
    """Tokens that each step yields."""


def bench_prefill(
    config: ModelConfig, *, context: int, batch: int = 1, precision: Precision = "fp32"
) -> InferenceSpeed:
    """Reads prompts of ``context`` tokens, up to the logits of the token after each."""
    _check(config, context, batch)
    transformer = build_model(config, dtype=_DTYPES[precision]).transformer

    def prefill() -> None:
        tokens_BT = torch.randint(config.vocab_size, (batch, context))
        _next_tokens(transformer, tokens_BT, _empty_cache(transformer, batch))

    seconds = _median_seconds(prefill)
    head = 2 * main_model(config).head
    flops = batch * (context * (forward_flops(config, context) - head) + head)
    limit = flops / (measure_gemm_gflops(_DTYPES[precision]) * 1e9)
    return _speed(batch * context / seconds, context, batch, precision, limit / seconds)


def bench_decode(config: ModelConfig, *, context: int, batch: int = 1, precision: Precision = "fp32") -> InferenceSpeed:
    """Decodes over a cache of ``context`` tokens in each sequence."""
    _check(config, context, batch)
    transformer = build_model(config, dtype=_DTYPES[precision]).transformer
    use_huge_pages(transformer)
    cache = _empty_cache(transformer, batch)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, torch.randn(batch, context, config.latent_dim, dtype=_DTYPES[precision]))
    cache.advance(context)

    def decode() -> None:
        for tokens_BT in torch.randint(config.vocab_size, (_DECODE_STEPS, batch, 1)):
            _next_tokens(transformer, tokens_BT, cache)
            cache.truncate(context)

    seconds = _median_seconds(decode) / _DECODE_STEPS
    traffic = decode_bytes(config, context, batch, bytes_per_number=_DTYPES[precision].itemsize)
    limit = traffic / (measure_bandwidth_gb_s() * 1e9)
    return _speed(batch / seconds, context, batch, precision, limit / seconds)


def _check(config: ModelConfig, context: int, batch: int) -> None:
    if not 0 < context < config.max_position_embeddings:
        raise InputError(f"context={context}: must be from 1 to {config.max_position_embeddings - 1}, "
                         "less than max_position_embeddings")  # fmt: skip
    if batch < 1:
        raise InputError(f"batch={batch}: must be at least 1")


def _empty_cache(transformer: Transformer, batch: int) -> LatentCache:
    config, dtype = transformer.config, transformer.embed.weight.dtype
    return LatentCache(config.num_hidden_layers, batch, config.latent_dim, dtype=dtype)


def _next_tokens(transformer: Transformer, tokens_BT: torch.Tensor, cache: LatentCache) -> torch.Tensor:
    """A greedy step as the engine does it."""
    hidden_BTD, _ = transformer.hidden(tokens_BT, cache=cache)
    cache.advance(tokens_BT.shape[1])
    next_B: torch.Tensor = transformer.head(hidden_BTD[:, -1]).argmax(-1)
    return next_B


@torch.inference_mode()
def _median_seconds(work: Callable[[], None]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _speed(tokens_per_s: float, context: int, batch: int, precision: Precision, share: float) -> InferenceSpeed:
    return InferenceSpeed(
        tokens_per_s=tokens_per_s, context=context, batch=batch, precision=precision,
        memory_gb_per_s=measure_bandwidth_gb_s(), gemm_gflops=measure_gemm_gflops(_DTYPES[precision]),
        share_of_limit=share, accepted_per_step=1.0,
    )  # fmt: skip
