"""Inference beside Hugging Face transformers: the same sizes, the same work, alternating in one process.

    pip install 'benthic[peers]'
    python benchmarks/inference_vs_transformers.py [PRESET]

Prefill reads 512 and 2048 tokens, up to the logits of the next; decode appends one token to a cache of 128 and 2048,
and forgets it again. Both models are random fp32 of the same sizes, and the repeats alternate so that a busy moment
falls on both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from benthic.config.presets import PRESETS
from benthic.config.schema import ModelConfig
from benthic.convert.config import config_to_hf
from benthic.lab.bench_inference import decode_step, prompt_reader
from benthic.model import build_model

REPEATS = 7
DECODE_STEPS = 8


class Ours:
    """Benthic as its engine reads and decodes."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = build_model(config)

    def reader(self, length: int) -> Callable[[torch.Tensor], object]:
        """What reads tokens (1, T) and computes the logits after the last."""
        read = prompt_reader(self.model, length)
        return lambda tokens_1T: read(tokens_1T[0].tolist())

    def decoder(self, context: int) -> Callable[[torch.Tensor], object]:
        """What decodes a token (1, 1) over a cache of this many tokens."""
        step, _ = decode_step(self.model, context, 1, "fp32")
        return lambda token_11: step(token_11[0])


class Theirs:
    """transformers' DeepseekV3ForCausalLM over its own cache."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_hf(config, torch.float32, {}))).eval()

    def reader(self, length: int) -> Callable[[torch.Tensor], object]:
        """What reads tokens (1, T) into a new cache and computes the logits after the last."""
        return lambda tokens_1T: self._step(tokens_1T, DynamicCache())

    def decoder(self, context: int) -> Callable[[torch.Tensor], object]:
        """What decodes a token (1, 1) over a cache of this many tokens, and always the same."""
        cache = DynamicCache()
        self._step(torch.randint(self.model.config.vocab_size, (1, context)), cache)

        def decode(token_11: torch.Tensor) -> None:
            self._step(token_11, cache)
            cache.crop(-1)  # else it grows from step to step, by more than itself at a context of 128
            assert cache.get_seq_length() == context

        return decode

    def _step(self, tokens_BT: torch.Tensor, cache: DynamicCache) -> None:
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
        tokens_1T = torch.randint(config.vocab_size, (1, length))
        readers = [engine.reader(length) for engine in engines]
        works: list[Callable[[], object]] = [partial(read, tokens_1T) for read in readers]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name in PRESETS if "bench" in name]
    parser.add_argument("preset", nargs="?", default="bench-400m", choices=presets)
    main(parser.parse_args().preset)
