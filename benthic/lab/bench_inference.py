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
from benthic.inference.native_decode import PAGE, native_decoder
from benthic.inference.weights import round_weights
from benthic.model import LanguageModel, Transformer, build_model
from benthic.ops import native
from benthic.plan.counts import main_model
from benthic.plan.decode import decode_bytes
from benthic.plan.flops import forward_flops
from benthic.plan.machine import measure_bandwidth_gb_s, measure_gemm_gflops
from benthic.precision.quantise import Precision

Arithmetic = Literal["fp32", "bf16"]
_Step = Callable[[torch.Tensor], torch.Tensor]
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
    memory_gb_per_s: float
    gemm_gflops: float
    """Both measured in this process; the second in the same precision."""
    share_of_limit: float
    """Least time the work can take, by arithmetic (prefill) or by memory traffic (decode), over the time it took."""
    accepted_per_step: float
    """Tokens that each step yields."""
    kernels: str
    """What did the work."""


def bench_prefill(
    config: ModelConfig, *, context: int, batch: int = 1, precision: Arithmetic = "fp32"
) -> InferenceSpeed:
    """Reads prompts of ``context`` tokens, up to the logits of the token after each."""
    _check(config, context, batch)
    transformer = build_model(config, dtype=_dtype(precision)).transformer

    def prefill() -> None:
        tokens_BT = torch.randint(config.vocab_size, (batch, context))
        _next_tokens(transformer, tokens_BT, _empty_cache(transformer, batch))

    seconds = _median_seconds(prefill)
    head = 2 * main_model(config).head
    flops = batch * (context * (forward_flops(config, context) - head) + head)
    limit = flops / (measure_gemm_gflops(_dtype(precision)) * 1e9)
    return _speed(batch * context / seconds, context, batch, precision, limit / seconds, native.status())


def bench_decode(config: ModelConfig, *, context: int, batch: int = 1, precision: Precision = "fp32") -> InferenceSpeed:
    """Decodes over a cache of ``context`` tokens in each sequence; it is fp32, but bf16 beside weights in bf16."""
    _check(config, context, batch, shortest=0)
    dtype = _dtype(precision)
    model = build_model(config, dtype=dtype)
    step, kernels = decode_step(model, context, batch, precision)

    def decode() -> None:
        for tokens_B in torch.randint(config.vocab_size, (_DECODE_STEPS, batch)):
            step(tokens_B)

    seconds = _median_seconds(decode) / _DECODE_STEPS
    traffic = decode_bytes(config, context, batch, bytes_per_number=dtype.itemsize, precision=precision)
    limit = traffic / (measure_bandwidth_gb_s() * 1e9)
    return _speed(batch / seconds, context, batch, precision, limit / seconds, kernels)


def decode_step(model: LanguageModel, context: int, batch: int, precision: Precision) -> tuple[_Step, str]:
    """A greedy step of sequences at this context, over latents that are random, and the kernels that do it."""
    return _native_step(model, context, batch, precision) or _pytorch_step(model, context, batch, precision)


@dataclass
class _Pages:
    pages_N: list[torch.Tensor]


def _native_step(model: LanguageModel, context: int, batch: int, precision: Precision) -> tuple[_Step, str] | None:
    """In C++, if there is native decoding here."""
    decoder = native_decoder(model, precision=precision)
    if decoder is None:
        return None
    config, dtype = model.config, model.transformer.embed.weight.dtype
    table_BP = torch.arange(batch * (context // PAGE + 1), dtype=torch.int32).view(batch, -1)
    shape = (table_BP.numel(), PAGE, config.latent_dim)
    cache = _Pages([torch.randn(shape, dtype=dtype) for _ in range(config.num_hidden_layers)])
    positions_B = torch.full((batch,), context)
    return lambda tokens_B: decoder(tokens_B, positions_B, table_BP, cache)[0].argmax(-1), decoder.name


def _pytorch_step(model: LanguageModel, context: int, batch: int, precision: Precision) -> tuple[_Step, str]:
    """The same in plain PyTorch, with rounded weights in the dtype they had."""
    config, transformer = model.config, round_weights(model, precision).transformer
    use_huge_pages(transformer)
    cache = _empty_cache(transformer, batch)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, torch.randn(batch, context, config.latent_dim, dtype=transformer.embed.weight.dtype))
    cache.advance(context)

    def step(tokens_B: torch.Tensor) -> torch.Tensor:
        next_B = _next_tokens(transformer, tokens_B[:, None], cache)
        cache.truncate(context)
        return next_B

    return step, native.decode_library()[1]


def _dtype(precision: Precision) -> torch.dtype:
    return _DTYPES.get(precision, torch.float32)


def _check(config: ModelConfig, context: int, batch: int, *, shortest: int = 1) -> None:
    if not shortest <= context < config.max_position_embeddings:
        raise InputError(f"context={context}: must be from {shortest} to {config.max_position_embeddings - 1}, "
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


def _speed(
    tokens_per_s: float, context: int, batch: int, precision: Precision, share: float, kernels: str
) -> InferenceSpeed:  # fmt: skip
    return InferenceSpeed(
        tokens_per_s=tokens_per_s, context=context, batch=batch, precision=precision,
        memory_gb_per_s=measure_bandwidth_gb_s(), gemm_gflops=measure_gemm_gflops(_dtype(precision)),
        share_of_limit=share, accepted_per_step=1.0, kernels=kernels,
    )  # fmt: skip
