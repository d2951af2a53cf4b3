"""What this machine can do at best, measured in this process: the limit every speed is a share of.

Figures from a data sheet would flatter or slander; a matrix product and a read through memory take a second.
"""

import time
from collections.abc import Callable
from functools import cache

import torch

_SIZE = 2048
_REPEATS = 5
_BUFFER_BYTES = 2**29
"""Far more than any cache holds."""


@cache
def measure_gemm_gflops(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """:func:`gemm_gflops`, measured once a process."""
    return gemm_gflops(dtype, device)


def gemm_gflops(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Best rate of a 2048 x 2048 x 2048 matrix product on a device of this machine just now, in GFLOP/s."""
    a, b = torch.randn(2, _SIZE, _SIZE).to(device, dtype)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * _SIZE**3 / _best_seconds(multiply) / 1e9


@cache
def measure_bandwidth_gb_s() -> float:
    """Best rate of reading memory on all threads, in GB/s (1e9 bytes); measured once a process.

    A sum beside a product with a vector: on some processors the BLAS reads at half the rate.
    """
    matrix, vector = torch.ones(_BUFFER_BYTES // 4 // _SIZE, _SIZE), torch.ones(_SIZE)
    seconds = min(_best_seconds(matrix.sum), _best_seconds(lambda: torch.mv(matrix, vector)))
    return _BUFFER_BYTES / seconds / 1e9


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
