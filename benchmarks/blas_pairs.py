"""The same work with products of our own and by the BLAS in turn, as shares of the GEMM peak of the moment.

Before each pair the rate of a large product by PyTorch is measured: machines have slow moments, and shares are of
the rate at theirs.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benthic.ops import native
from benthic.plan.machine import gemm_gflops


def print_pairs(
    work: Callable[[], object], flops: float, tokens: int, pairs: int, dtype: torch.dtype = torch.float32
) -> None:
    """Medians over so many pairs, after one to warm up, of tokens per second and shares; ``flops`` are of one piece of
    work, which is ``tokens``, in ``dtype``. Ends the script where all products are the BLAS's.
    """
    if not native.has_tiles() and not native.has_fast_vectors():
        sys.exit("all products are the BLAS's: it is the faster on this processor, or BENTHIC_NATIVE asks for it")
    measured = [_pair(work, dtype) for _ in range(1 + pairs)][1:]
    for place, name in enumerate(("our own", "by the BLAS")):
        rate = statistics.median(tokens / seconds[place] for _, *seconds in measured)
        share = statistics.median(flops / seconds[place] / (gflops * 1e9) for gflops, *seconds in measured)
        print(f"{name}: {rate:,.0f} tokens/s, {share:.2f} of the GEMM peak")
    ratios = sorted(blas / own for _, own, blas in measured)
    print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {pairs} pairs")


def _pair(work: Callable[[], object], dtype: torch.dtype) -> tuple[float, float, float]:
    """The rate of a large product in GFLOP/s, and seconds of the work with our own products and without."""

    def seconds(setting: str) -> float:
        os.environ["BENTHIC_NATIVE"] = setting
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return gemm_gflops(dtype), seconds("1"), seconds("blas")
