"""Speed of inference here: reading a prompt against the best matrix product, decoding against memory bandwidth.

What is timed is what the engine does: prompts read in its chunks, one prompt after another, and steps of the decoder
that it would choose, over the same paged cache. The weights are random, and so are the tokens and the latents that
fill the cache: a step's time hardly depends on what they are, except that random tokens choose different experts, as
text does, and defeat the processor's caches. MTP modules take no part.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benthic.config.schema import ModelConfig
from benthic.errors import InputError
from benthic.inference.decode import decoder
from benthic.inference.huge_pages import use_huge_pages
from benthic.inference.limits import chunk_length
from benthic.inference.paged_cache import PagedCache, pages_for
from benthic.inference.prefill import read_chunk
from benthic.model import LanguageModel, build_model
from benthic.ops.product import said_of_kernels
from benthic.plan.counts import main_model
from benthic.plan.decode import decode_bytes
from benthic.plan.flops import forward_flops
from benthic.plan.machine import measure_bandwidth_gb_s, measure_gemm_gflops
from benthic.precision.latents import CACHE_DTYPES, CachePrecision
from benthic.precision.quantise import Precision

Arithmetic = Literal["fp32", "bf16"]
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16}
"""Of weights that stay as they are, and of the cache, where that is not fp32."""
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
    cache_precision: CachePrecision
    memory_gb_per_s: float
    gemm_gflops: float
    """Both measured in this process; the second in the same precision."""
    share_of_limit: float
    """Least time the work can take, by arithmetic (prefill) or by memory traffic (decode), over the time it took."""
    accepted_per_step: float
    """Tokens that a sequence gains by a step: 1, since nothing is drafted. A fresh model's guesses would all be wrong;
    what drafts bring to a trained one, its engine counts (``EngineStats.accepted_tokens``)."""
    kernels: str
    """What did the work."""


def bench_prefill(
    config: ModelConfig, *, context: int, batch: int = 1, precision: Arithmetic = "fp32"
) -> InferenceSpeed:
    """Reads prompts of ``context`` tokens one by one, up to the logits of the token after each."""
    _check(config, context, batch)
    model = build_model(config, dtype=_dtype(precision))
    read, kernels = prompt_reader(model, context), said_of_kernels(model.transformer.embed.weight, tiles=True)

    def prefill() -> None:
        for ids in torch.randint(config.vocab_size, (batch, context)).tolist():
            read(ids)

    seconds = _median_seconds(prefill)
    limit = batch * prefill_flops(config, context) / (measure_gemm_gflops(_dtype(precision)) * 1e9)
    return _speed(batch * context / seconds, context, batch, precision, precision, limit / seconds, kernels)


def bench_decode(
    config: ModelConfig, *, context: int, batch: int = 1, precision: Precision = "fp32",
    cache_precision: CachePrecision | None = None,
) -> InferenceSpeed:  # fmt: skip
    """Decodes over a cache of ``context`` tokens in each sequence; by default fp32, but bf16 beside weights in bf16."""
    _check(config, context, batch, shortest=0)
    dtype = _dtype(precision)
    model = build_model(config, dtype=dtype)
    kept: CachePrecision = cache_precision or ("bf16" if precision == "bf16" else "fp32")
    step, kernels = decode_step(model, context, batch, precision, kept)

    def decode() -> None:
        for tokens_B in torch.randint(config.vocab_size, (_DECODE_STEPS, batch)):
            step(tokens_B)

    seconds = _median_seconds(decode) / _DECODE_STEPS
    traffic = decode_bytes(
        config, context, batch, bytes_per_number=dtype.itemsize, precision=precision, cache_precision=kept
    )
    limit = traffic / (measure_bandwidth_gb_s() * 1e9)
    return _speed(batch / seconds, context, batch, precision, kept, limit / seconds, kernels)


def prefill_flops(config: ModelConfig, context: int) -> float:
    """Operations to read a prompt of so many tokens, up to the logits of the one after it."""
    head = 2 * main_model(config).head
    return context * (forward_flops(config, context) - head) + head


def prompt_reader(model: LanguageModel, context: int) -> Callable[[list[int]], torch.Tensor]:
    """What reads a prompt of up to this many tokens as the engine does: ids in, the greedy token after them out."""
    transformer, chunk = model.transformer, chunk_length(model.config)
    use_huge_pages(model.parameters())
    cache = PagedCache(model.config, pages_for(context), dtype=transformer.embed.weight.dtype)
    table_P = torch.arange(cache.pages, dtype=torch.int32)

    def read(ids: list[int]) -> torch.Tensor:
        for start in range(0, len(ids), chunk):
            hidden_TD = read_chunk(transformer, cache, table_P, start, ids[start : start + chunk])
        next_token: torch.Tensor = transformer.head(hidden_TD[-1]).argmax(-1)
        return next_token

    return read


def decode_step(
    model: LanguageModel, context: int, batch: int, precision: Precision, cache_precision: CachePrecision = "fp32"
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """A greedy step of sequences at this context, over latents that are random, and the kernels that do it.

    The model's weights are replaced by what they are worth in ``precision``, as the engine does.
    """
    decode = decoder(model, precision)
    table_BP = torch.arange(batch * pages_for(context + 1), dtype=torch.int32).view(batch, -1)
    cache = PagedCache(model.config, table_BP.numel(), dtype=CACHE_DTYPES[cache_precision])
    for pages in cache.pages_N:
        for page in pages:  # one at a time, since the numbers they are made of are fp32
            page.copy_(cache.format.pack(torch.randn(len(page), model.config.latent_dim)))
    positions_B = torch.full((batch,), context)
    return lambda tokens_B: decode(tokens_B, positions_B, table_BP, cache)[0].argmax(-1), decode.name


def _dtype(precision: Precision) -> torch.dtype:
    return _DTYPES.get(precision, torch.float32)


def _check(config: ModelConfig, context: int, batch: int, *, shortest: int = 1) -> None:
    if not shortest <= context < config.max_position_embeddings:
        raise InputError(f"context={context}: must be from {shortest} to {config.max_position_embeddings - 1}, "
                         "less than max_position_embeddings")  # fmt: skip
    if batch < 1:
        raise InputError(f"batch={batch}: must be at least 1")


@torch.inference_mode()
def _median_seconds(work: Callable[[], None]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _speed(
    tokens_per_s: float, context: int, batch: int, precision: Precision, cache_precision: CachePrecision, share: float,
    kernels: str,
) -> InferenceSpeed:  # fmt: skip
    return InferenceSpeed(
        tokens_per_s=tokens_per_s, context=context, batch=batch, precision=precision, cache_precision=cache_precision,
        memory_gb_per_s=measure_bandwidth_gb_s(), gemm_gflops=measure_gemm_gflops(_dtype(precision)),
        share_of_limit=share, accepted_per_step=1.0, kernels=kernels,
    )  # fmt: skip
