"""Decoding and prefill beside llama.cpp: the same random weights, alternating in one process.

    pip install 'benthic[gguf,llama]'
    python benchmarks/decode_vs_llamacpp.py [PRESET] [--precisions fp32,int8] [--decode 0,2048] [--prefill 512,2048]

For each precision the preset is exported to GGUF (F32, BF16, Q8_0, Q4_0; it has no FP8). In each of five rounds
Benthic's own benchmark (`benthic bench decode` and `prefill`) is followed by the same work in llama.cpp, on as many
threads; medians are shown. llama.cpp runs as it comes, with an fp16 cache, and flash attention where it chooses that,
but without its AMX kernels, which fail: see llama_peer.py. Both decode 16 tokens from a cache that holds the context;
at a context of 0 it is empty. Benthic's stays at that length, llama.cpp's grows by the tokens decoded. Benthic prefills
in bf16 or, with all other precisions, in fp32.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from steps import script_parser

from benthic.config.presets import PRESETS
from benthic.console import mistakes_in_one_line
from benthic.convert.gguf import Precision as GGUFPrecision
from benthic.convert.gguf import write_gguf
from benthic.lab.bench_inference import InferenceSpeed, bench_decode, bench_prefill
from benthic.model import build_model
from benthic.precision.quantise import Precision

if TYPE_CHECKING:
    from llama_peer import LlamaCpp

ROUNDS = 5
DECODE_STEPS = 16
GGUF_OF: dict[Precision, GGUFPrecision] = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True)
class Line:
    """One kind of work, in tokens/s."""

    work: str
    context: int
    precision: str
    benthic: float
    llama_cpp: float
    share_of_limit: float
    """Of Benthic: what the machine could do at best, as `benthic bench` says."""

    @property
    def ratio(self) -> float:
        """Benthic's rate over llama.cpp's."""
        return self.benthic / self.llama_cpp


def main(arguments: Sequence[str]) -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "preset", nargs="?", default="bench-400m", choices=[name for name in PRESETS if "bench" in name]
    )
    parser.add_argument(
        "--precisions", type=precisions, default=list(GGUF_OF), help=f"of {', '.join(GGUF_OF)}, separated by commas"
    )
    parser.add_argument("--decode", type=lengths(0), default=[0, 2048], help="contexts to decode at; - for none")
    parser.add_argument("--prefill", type=lengths(1), default=[512, 2048], help="prompts to read; - for none")
    parser.add_argument("--files", type=Path, help="where GGUF files are kept from one run to the next")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    import llama_peer  # noqa: F401 - says what is missing before anything is exported

    works = [("decode", n) for n in given.decode] + [("prefill", n) for n in given.prefill]
    if not given.json:
        print(f"{given.preset}, batch 1, {torch.get_num_threads()} threads, medians of {ROUNDS}")
        print(f"{'work':<14}{'precision':>10}{'benthic tok/s':>16}{'llama.cpp tok/s':>17}{'ratio':>8}{'of limit':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.files or Path(scratch)
        lines = []
        for precision in given.precisions:
            file = exported(given.preset, precision, folder)
            for work, context in works:
                lines.append(compare(given.preset, file, precision, work, context))
                if not given.json:
                    show(lines[-1])
    if given.json:
        print(json.dumps([asdict(line) | {"ratio": line.ratio} for line in lines], indent=2))


def precisions(text: str) -> list[str]:
    """An option's precisions."""
    asked = text.split(",")
    for name in asked:
        if name not in GGUF_OF:
            raise argparse.ArgumentTypeError(f"{name}: no such precision in GGUF; allowed are {', '.join(GGUF_OF)}")
    return asked


def lengths(least: int) -> Callable[[str], list[int]]:
    """What reads an option's numbers of tokens, none of which may be less."""

    def read(text: str) -> list[int]:
        numbers = [] if text == "-" else text.split(",")
        for number in numbers:
            if not number.isdecimal() or int(number) < least:
                raise argparse.ArgumentTypeError(f"{number}: must be a number of tokens, at least {least}")
        return [int(number) for number in numbers]

    return read


def exported(preset: str, precision: Precision, folder: Path) -> Path:
    """The preset with random weights as a GGUF file."""
    file = folder / f"{preset}-{GGUF_OF[precision]}.gguf"
    if not file.exists():
        config = PRESETS[preset]
        write_gguf(build_model(config), config, None, file, GGUF_OF[precision])
    return file


def compare(preset: str, file: Path, precision: Precision, work: str, context: int) -> Line:
    """Rounds of ours, then theirs."""
    from llama_peer import AUTOMATIC, F16, LlamaCpp

    config = PRESETS[preset]
    bench: Callable[[], InferenceSpeed]
    if work == "decode":
        bench = partial(bench_decode, config, context=context, precision=precision)
    else:
        # Whatever weights are kept in, prompts are read in what they were trained in.
        bench = partial(bench_prefill, config, context=context, precision="bf16" if precision == "bf16" else "fp32")
    ours, shares, theirs = [], [], []
    threads, room = torch.get_num_threads(), context + DECODE_STEPS
    with LlamaCpp(file, context=room, threads=threads, cache_type=F16, flash=AUTOMATIC) as llama:
        run = llama_work(llama, work, context, config.vocab_size)
        run()
        for _ in range(ROUNDS):
            speed = bench()
            ours.append(speed.tokens_per_s)
            shares.append(speed.share_of_limit)
            start = time.perf_counter()
            tokens = run()
            theirs.append(tokens / (time.perf_counter() - start))
    return Line(work, context, precision, *map(statistics.median, (ours, theirs, shares)))


def llama_work(llama: "LlamaCpp", work: str, context: int, vocab_size: int) -> Callable[[], int]:
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
    if context:
        prefill()
    return decode


def show(line: Line) -> None:
    print(
        f"{f'{line.work} {line.context}':<14}{line.precision:>10}{line.benthic:>16.1f}{line.llama_cpp:>17.1f}"
        f"{line.ratio:>8.2f}{line.share_of_limit:>10.2f}",
        flush=True,
    )


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
