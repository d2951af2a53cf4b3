"""Inference beside Hugging Face transformers: the same sizes, the same work, alternating in one process.

    pip install 'benthic[peers]'
    python benchmarks/inference_vs_transformers.py [PRESET]

Prefill reads 512 and 2048 tokens, up to the logits of the next; decode appends one token to a cache of 128 and 2048.
Both models are random fp32 of the same sizes, and the repeats alternate so that a busy moment falls on both.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from benthic.config.presets import PRESETS
from benthic.config.schema import ModelConfig
from benthic.convert.config import config_to_hf
from benthic.inference.cache import LatentCache
from benthic.lab.bench_inference import decode_step
from benthic.model import build_model

REPEATS = 7
DECODE_STEPS = 8


class Ours:
    """Benthic's transformer over its latent cache."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = build_model(config)
        self.config = config

    def prefill(self, tokens_BT: torch.Tensor) -> LatentCache:
        """Reads tokens into a new cache and computes the logits after the last."""
        transformer = self.model.transformer
        cache = LatentCache(self.config.num_hidden_layers, 1, self.config.latent_dim, dtype=torch.float32)
        hidden_BTD, _ = transformer.hidden(tokens_BT, cache=cache)
        transformer.head(hidden_BTD[:, -1]).argmax(-1)
        return cache

    def decoder(self, context: int) -> Callable[[torch.Tensor], object]:
        """What decodes a token (1, 1) over a cache of this many tokens."""
        step, _ = decode_step(self.model, context, 1, "fp32")
        return lambda token_11: step(token_11[0])


class Theirs:
    """transformers' DeepseekV3ForCausalLM over its own cache."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_hf(config, torch.float32, {}))).eval()

    def prefill(self, tokens_BT: torch.Tensor) -> DynamicCache:
        """Reads tokens into a new cache and computes the logits after the last."""
        cache = DynamicCache()
        self.step(tokens_BT, cache)
        return cache

    def decoder(self, context: int) -> Callable[[torch.Tensor], object]:
        """What decodes a token (1, 1) over a cache of this many tokens, which grows by it."""
        cache = self.prefill(torch.randint(self.model.config.vocab_size, (1, context)))
        return lambda token_11: self.step(token_11, cache)

    def step(self, tokens_BT: torch.Tensor, cache: DynamicCache) -> None:
        """Appends tokens to the cache and computes the logits after the last."""
        self.model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)


@torch.inference_mode()
def main(preset: str) -> None:
    """Prints a line for each kind of work: tokens/s of both, and the ratio."""
    config = PRESETS[preset]
    engines = (Ours(config), Theirs(config))
    print(f"{preset}, fp32, batch 1, {torch.get_num_threads()} threads")
    print(f"{'work':<16}{'benthic tok/s':>16}{'transformers tok/s':>20}{'ratio':>8}")
    for length in (512, 2048):
        tokens_BT = torch.randint(config.vocab_size, (1, length))
        works = [lambda engine=engine, tokens=tokens_BT: engine.prefill(tokens) for engine in engines]
        report(f"prefill {length}", length, works)
    for context in (128, 2048):
        report(f"decode at {context}", DECODE_STEPS, [decoder(engine, config, context) for engine in engines])


def decoder(engine: Ours | Theirs, config: ModelConfig, context: int) -> Callable[[], object]:
    """Work that decodes random tokens."""
    step = engine.decoder(context)

    def decode() -> None:
        for token_11 in torch.randint(config.vocab_size, (DECODE_STEPS, 1, 1)):
            step(token_11)

    return decode


def report(name: str, tokens: int, works: list[Callable[[], object]]) -> None:
    """Times both in turn and prints medians."""
    seconds: list[list[float]] = [[], []]
    for repeat in range(1 + REPEATS):
        for side, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            work()
            if repeat:
                side.append(time.perf_counter() - start)
    ours, theirs = (tokens / statistics.median(side) for side in seconds)
    print(f"{name:<16}{ours:>16.1f}{theirs:>20.1f}{ours / theirs:>8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "bench-400m")
