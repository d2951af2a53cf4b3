"""Reading a prompt on AMX tiles beside reading it by the BLAS, in turn in one process, as shares of the GEMM peak.

    python benchmarks/prefill_on_tiles.py [PRESET] [--context 512] [--pairs 9]

Before each pair the rate of a large fp32 product by the BLAS is measured: machines have slow moments, and shares are of
the rate at theirs. Medians.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from benthic.config.presets import PRESETS
from benthic.lab.bench_inference import prefill_flops, prompt_reader
from benthic.model import build_model
from benthic.ops import native
from benthic.plan.machine import measure_gemm_gflops


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="bench-400m", choices=PRESETS)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    if not native.has_tiles():
        parser.exit(1, "this processor has no tiles, or BENTHIC_NATIVE leaves them out\n")
    config = PRESETS[given.preset]
    read = prompt_reader(build_model(config), given.context)
    prompt = torch.randint(config.vocab_size, (given.context,)).tolist()
    pairs = [pair(read, prompt) for _ in range(1 + given.pairs)][1:]  # the first warms up
    flops = prefill_flops(config, given.context)
    for place, name in enumerate(("on tiles", "by the BLAS")):
        rate = statistics.median(given.context / seconds[place] for _, *seconds in pairs)
        share = statistics.median(flops / seconds[place] / (gflops * 1e9) for gflops, *seconds in pairs)
        print(f"{name}: {rate:,.0f} tokens/s, {share:.2f} of the GEMM peak")
    print(f"ratio {statistics.median(blas / tiles for _, tiles, blas in pairs):.2f}, {len(pairs)} pairs")


def pair(read: Callable[[list[int]], torch.Tensor], prompt: list[int]) -> tuple[float, float, float]:
    """The BLAS's rate in GFLOP/s, and seconds for a prompt on tiles and without."""

    def seconds(setting: str) -> float:
        os.environ["BENTHIC_NATIVE"] = setting
        start = time.perf_counter()
        read(prompt)
        return time.perf_counter() - start

    return measure_gemm_gflops(torch.float32), seconds("1"), seconds("blas")


if __name__ == "__main__":
    main()
