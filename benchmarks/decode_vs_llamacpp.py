"""Decoding and prefill beside llama.cpp: the same random weights, alternating in one process.

    pip install 'benthic[gguf,llama]'
    python benchmarks/decode_vs_llamacpp.py [PRESET] [--precisions fp32,int8] [--decode 0,2048] [--prefill 512,2048]

For each precision the preset is exported to GGUF (F32, BF16, Q8_0, Q4_0). In each of five rounds Benthic's own
benchmark (`benthic bench decode` and `prefill`) is followed by the same work in llama.cpp, on as many threads; medians
are shown. llama.cpp runs as it comes, with an fp16 cache, and flash attention where it chooses that, but without its
AMX kernels, which fail: see llama_peer.py. A context of 0 has one token in the cache. Where Benthic has no such
precision, only llama.cpp is measured.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from llama_peer import AUTOMATIC, F16, LlamaCpp

from benthic.config.presets import PRESETS
from benthic.convert.gguf import write_gguf
from benthic.lab import bench_inference
from benthic.model import build_model

ROUNDS = 5
DECODE_STEPS = 16
GGUF_OF = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
OURS = get_args(bench_inference.Precision)


@dataclass(frozen=True)
class Line:
    """One kind of work, in tokens/s."""

    work: str
    context: int
    precision: str
    benthic: float | None
    llama_cpp: float
    share_of_limit: float | None
    """Of Benthic: what the machine could do at best, as `benthic bench` says."""

    @property
    def ratio(self) -> float | None:
        """Benthic's rate over llama.cpp's."""
        return None if self.benthic is None else self.benthic / self.llama_cpp


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "preset", nargs="?", default="bench-400m", choices=[name for name in PRESETS if "bench" in name]
    )
    parser.add_argument("--precisions", default=",".join(GGUF_OF), help="of " + ", ".join(GGUF_OF))
    parser.add_argument("--decode", default="0,2048", help="contexts to decode at, separated by commas; - for none")
    parser.add_argument("--prefill", default="512,2048", help="prompts to read; - for none")
    parser.add_argument("--files", type=Path, help="where GGUF files are kept from one run to the next")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    works = [("decode", n) for n in numbers(given.decode)] + [("prefill", n) for n in numbers(given.prefill)]
    if not given.json:
        print(f"{given.preset}, batch 1, {torch.get_num_threads()} threads, medians of {ROUNDS}")
        print(f"{'work':<14}{'precision':>10}{'benthic tok/s':>16}{'llama.cpp tok/s':>17}{'ratio':>8}{'of limit':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.files or Path(scratch)
        lines = []
        for precision in given.precisions.split(","):
            file = exported(given.preset, precision, folder)
            for work, context in works:
                lines.append(compare(given.preset, file, precision, work, context))
                if not given.json:
                    show(lines[-1])
    if given.json:
        print(json.dumps([asdict(line) | {"ratio": line.ratio} for line in lines], indent=2))


def numbers(text: str) -> list[int]:
    return [] if text == "-" else [int(number) for number in text.split(",")]


def exported(preset: str, precision: str, folder: Path) -> Path:
    """The preset with random weights as a GGUF file."""
    file = folder / f"{preset}-{GGUF_OF[precision]}.gguf"
    if not file.exists():
        config = PRESETS[preset]
        write_gguf(build_model(config), config, None, file, GGUF_OF[precision])
    return file


def compare(preset: str, file: Path, precision: str, work: str, context: int) -> Line:
    """Rounds of ours, then theirs."""
    config, context = PRESETS[preset], max(context, 1)
    ours, shares, theirs = [], [], []
    threads, room = torch.get_num_threads(), context + DECODE_STEPS
    with LlamaCpp(file, context=room, threads=threads, cache_type=F16, flash=AUTOMATIC) as llama:
        run = llama_work(llama, work, context, config.vocab_size)
        run()
        for _ in range(ROUNDS):
            if precision in OURS:
                bench = getattr(bench_inference, f"bench_{work}")
                speed = bench(config, context=context, precision=precision)
                ours.append(speed.tokens_per_s)
                shares.append(speed.share_of_limit)
            start = time.perf_counter()
            tokens = run()
            theirs.append(tokens / (time.perf_counter() - start))
    medians = [statistics.median(figures) if figures else None for figures in (ours, shares)]
    return Line(work, context, precision, medians[0], statistics.median(theirs), medians[1])


def llama_work(llama: LlamaCpp, work: str, context: int, vocab_size: int) -> Callable[[], int]:
    """Work in llama.cpp that returns how many tokens it did."""
    prompt = torch.randint(vocab_size, (context,)).tolist()

    def prefill() -> int:
        llama.forget()
        llama.read(prompt)
        return context

    def decode() -> int:
        llama.forget(context)
        for token in torch.randint(vocab_size, (DECODE_STEPS,)).tolist():
            llama.read([token])
        return DECODE_STEPS

    if work == "prefill":
        return prefill
    prefill()
    return decode


def show(line: Line) -> None:
    cells = [f"{line.work} {line.context}", line.precision]
    figures = [(line.benthic, ".1f"), (line.llama_cpp, ".1f"), (line.ratio, ".2f"), (line.share_of_limit, ".2f")]
    texts = ["-" if figure is None else format(figure, form) for figure, form in figures]
    print(f"{cells[0]:<14}{cells[1]:>10}{texts[0]:>16}{texts[1]:>17}{texts[2]:>8}{texts[3]:>10}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
