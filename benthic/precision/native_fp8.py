"""Quantising and multiplying FP8 on CPUs in C++ (``ops/native/fp8``), with the bits that the PyTorch forms give.

Dimensions: M rows, N columns, K contracted; S rows in groups, E matrices; P and Q blocks along rows and columns.
"""

import ctypes

import torch
from torch import Tensor

from benthic.ops import native

_SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16", torch.float64: "_f64"}
_BLOCK = 128

_Matrix = tuple[Tensor, Tensor, int]
"""E4M3 numbers, scales, and how many rows share one: what :class:`benthic.precision.fp8.Quantised` holds."""


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels exist and take these tensors: numbers in this process's memory, and some of them."""
    return all(native.is_plain(x) and x.numel() > 0 for x in tensors) and native.fp8_library() is not None


def quantise(x_MN: Tensor, block: tuple[int, int], powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """As :func:`benthic.precision.blocks.quantise_blocks`, of a matrix or a stack of them."""
    rows, columns = x_MN.shape[-2:]
    scale_PQ = torch.empty(*x_MN.shape[:-2], -(-rows // block[0]), -(-columns // block[1]), dtype=torch.float32)
    return _quantise(x_MN, None, x_MN.numel() // (rows * columns), rows, block, powers_of_two, scale_PQ), scale_PQ


def quantise_columns(x_SM: Tensor, offsets: Tensor, powers_of_two: bool) -> tuple[Tensor, Tensor]:
    """E4M3 numbers, and scales of tiles of 128 x 1, of which no tile has rows of two groups.

    Args:
        x_SM: rows in groups.
        offsets: where each group begins, and the end.
    """
    tiles = int((offsets.diff() + (_BLOCK - 1)).div(_BLOCK, rounding_mode="floor").sum())
    scale_PM = torch.empty(tiles, x_SM.shape[1], dtype=torch.float32)
    return _quantise(x_SM, offsets, len(offsets) - 1, 0, (_BLOCK, 1), powers_of_two, scale_PM), scale_PM


def _quantise(
    x: Tensor,
    offsets: Tensor | None,
    groups: int,
    rows: int,
    block: tuple[int, int],
    powers_of_two: bool,
    scales: Tensor,
) -> Tensor:
    lines = _lines(x if x.dtype in _SUFFIX else x.float())
    numbers = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    native.run(
        _library(), f"quantise{_SUFFIX[lines.dtype]}", lines, lines.stride(0), offsets, groups, rows, lines.shape[1],
        *block, int(powers_of_two), numbers, scales,
    )  # fmt: skip
    return numbers


def dequantise(numbers_MN: Tensor, scale_PQ: Tensor, block: tuple[int, int]) -> Tensor:
    """As :func:`benthic.precision.blocks.dequantise_blocks`."""
    rows, columns = numbers_MN.shape[-2:]
    lines = _lines(numbers_MN)
    out_MN = torch.empty(numbers_MN.shape, dtype=torch.float32)
    native.run(
        _library(), "dequantise", lines, lines.stride(0), len(lines) // rows, rows, columns, *block,
        scale_PQ.float().contiguous(), out_MN,
    )  # fmt: skip
    return out_MN


def multiply(a_SK: _Matrix, b_NK: _Matrix, offsets: Tensor | None = None, first: int = 0) -> Tensor:
    """``a b^T`` (S, N) as :func:`benthic.precision.fp8.emulated_product`.

    With ``offsets``, group g of the rows of ``a`` is multiplied by matrix ``(first + g) % E`` of a stack.
    """
    (a, scale_a, height_a), (b, scale_b, height_b) = a_SK, b_NK
    a, b = _dense(a), _dense(b)
    stack = (b.stride(0), scale_b.stride(0), len(b)) if b.dim() > 2 else (0, 0, 1)
    out_SN = torch.empty(len(a), b.shape[-2], dtype=torch.float32)
    native.run(
        _library(), "multiply_rows", out_SN, a, *a.stride(), scale_a, *scale_a.stride(), height_a,
        b, stack[0], *b.stride()[-2:], scale_b, stack[1], *scale_b.stride()[-2:], height_b,
        offsets, 1 if offsets is None else len(offsets) - 1, first, stack[2], *out_SN.shape, a.shape[1],
    )  # fmt: skip
    return out_SN


def add_products(
    out_EMN: Tensor, a_SM: tuple[Tensor, Tensor], b_SN: tuple[Tensor, Tensor], offsets: Tensor, first: int
) -> None:
    """Add ``a_g^T b_g`` of each group g of rows to matrix ``(first + g) % E``, one group after another.

    Args:
        out_EMN: fp32 or fp64, dense.
        a_SM: numbers and scales of :func:`quantise_columns`, as ``b_SN``.
        offsets: where each group begins, and the end.
        first: number of the first group.
    """
    native.run(
        _library(), f"add_products{_SUFFIX[out_EMN.dtype]}", out_EMN, *a_SM, *b_SN, offsets, len(offsets) - 1, first,
        *out_EMN.shape,
    )  # fmt: skip


def _library() -> ctypes.CDLL:
    library = native.fp8_library()
    assert library is not None, "call usable() first"
    return library


def _lines(x: Tensor) -> Tensor:
    """All rows of a stack of matrices, each dense and all at one distance; copied only where they are not so."""
    lines = x.reshape(-1, x.shape[-1])
    return lines if lines.stride(1) == 1 else lines.contiguous()


def _dense(x: Tensor) -> Tensor:
    """Matrices whose rows or columns are dense."""
    return x if 1 in x.stride()[-2:] else x.contiguous()
