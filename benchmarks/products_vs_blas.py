"""Single matrix products by our own kernel for vector units beside the BLAS and PyTorch, in turn, in GFLOP/s.

    python benchmarks/products_vs_blas.py [--rounds 12]

In bf16, whose sums are fp32 but for PyTorch's, and in fp32, which PyTorch leaves to the BLAS. The best of the rounds.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from steps import script_parser
from torch import Tensor

from benthic.ops import native
from benthic.ops.product import multiply, own_products

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = (
    (8192, 192, 512, "TN"), (768, 192, 192, "NT"), (192, 192, 768, "TN"), (256, 192, 96, "NT"), (256, 1024, 1024, "NT"),
    (2048, 2048, 2048, "NT"),
)  # fmt: skip
"""Rows, columns and k; N where a factor's rows lie dense, T where its columns do."""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    if not native.has_fast_vectors():
        sys.exit("the BLAS is the faster on this processor, or BENTHIC_NATIVE asks for it")
    for precision, dtype in PRECISIONS.items():
        for m, n, k, layout in SHAPES:
            a = laid_out(torch.randn(m, k, dtype=dtype), layout[0])
            b = laid_out(torch.randn(k, n, dtype=dtype), layout[1])
            ways = ways_to_multiply(a, b)
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(1 + rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    best[name] = min(best[name], time.perf_counter() - start)
            rates = ", ".join(f"{name} {2 * m * n * k / seconds / 1e9:.0f}" for name, seconds in best.items())
            print(f"{precision}, {m:,} x {n:,} x {k:,} {layout}: {rates}", flush=True)


def laid_out(x: Tensor, letter: str) -> Tensor:
    """The same matrix with its rows dense (N) or its columns (T)."""
    return x.T.contiguous().T if letter == "T" else x


def ways_to_multiply(a: Tensor, b: Tensor) -> dict[str, Callable[[], object]]:
    """The kernel and the BLAS; in bf16 PyTorch too."""
    out = torch.empty(a.shape[0], b.shape[1])

    def kernel(setting: str) -> None:
        os.environ["BENTHIC_NATIVE"] = setting
        with own_products(a, tiles=False):
            multiply(a, b, out)

    ways: dict[str, Callable[[], object]] = {"kernel": lambda: kernel("1"), "BLAS": lambda: kernel("blas")}
    return ways if a.dtype == torch.float32 else {**ways, "PyTorch": lambda: a @ b}


if __name__ == "__main__":
    main()
