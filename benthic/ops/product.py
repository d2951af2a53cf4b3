"""Products by Benthic's own kernels where the BLAS is slow: on vector units, or of fp32 on the processor's bf16 tiles.

On processors that are not Intel's, MKL leaves a quarter of the vector units' rate and more unused, and in bf16 most of
it (``native/vector_gemm.cpp``). On tiles a number of fp32 is the sum of three of bf16; of the nine products of two such
sums, the six that matter in fp32 are computed (``native/amx.cpp``): as exact as fp32, and mostly faster, but slow at
times on machines shared with others, so they are only for those who ask. Results differ from PyTorch's in the last
bits, so nothing of fp32 is multiplied by either unless it runs inside of :func:`own_products`. Kernels of bf16, whose
results are rounded far above those bits, use the vector units wherever the BLAS is slow.

Dimensions: T rows, D in, F out; M, N and K of any product.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from benthic.ops import native
from benthic.ops.wanted import wanted


class Units(IntEnum):
    """What multiplies; kernels are told by these numbers (``native/common.h``)."""

    BLAS = 0
    VECTORS = 1
    TILES = 2


_FEWEST_ON_TILES = 32
"""Rows, columns and numbers summed over that a linear layer on tiles has at least."""
_LEAST_ON_VECTORS = 2**21
"""Multiplications that one on vector units has at least: with fewer, to call a kernel costs more than it saves."""

_SAID = {Units.BLAS: "", Units.VECTORS: ", products on vector units", Units.TILES: ", fp32 on bf16 tiles"}


class _Here(threading.local):
    units = Units.BLAS


_here = _Here()


def units_here() -> Units:
    """What the calling thread multiplies fp32 on: the BLAS, unless it is inside of :func:`own_products`."""
    return _here.units


def units_for(x: Tensor) -> Units:
    """What kernels multiply such numbers on, in this place."""
    if x.dtype == torch.bfloat16:
        return Units.VECTORS if native.is_plain(x) and native.has_fast_vectors() else Units.BLAS
    return units_here()


def said_of_kernels(weight: Tensor, *, tiles: bool) -> str:
    """For reports: which kernels compute with such weights inside of :func:`own_products`."""
    if weight.device.type != "cpu":
        return f"PyTorch kernels (on {weight.device.type})"
    units = units_for(weight) if weight.dtype == torch.bfloat16 else _units_inside(weight, tiles=tiles)
    return native.status() + _SAID[units]


@contextmanager
def own_products(weight: Tensor, *, tiles: bool) -> Iterator[None]:
    """Inside, and in this thread alone, large products of fp32 run on our own kernels where they are faster.

    Those are linear layers, whatever module calls ``torch.nn.functional.linear``, and the native kernels of attention,
    experts and cross-entropy. What is computed forward so is computed so backward too, inside or not. It does nothing
    under autocast.

    Args:
        weight: one of those to multiply by; unless they are fp32 and on the CPU there is nothing to do.
        tiles: on the processor's tiles, if it has any.
    """
    units = _units_inside(weight, tiles=tiles)
    if units == Units.BLAS or torch.is_autocast_enabled("cpu"):
        yield
        return
    before, _here.units = _here.units, units
    try:
        with _OwnLinear():
            yield
    finally:
        _here.units = before


def linear_as_here() -> Callable[..., Tensor]:
    """A linear layer without bias that multiplies as one would where this is called, wherever it runs itself."""
    return partial(_linear, units=units_here()) if units_here() else F.linear


def multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, on the units of this place; ``a`` and ``b`` may be transposed.

    A result of fp32 may have factors of bf16; it is then summed in fp32.
    """
    mixed = out_MN.dtype != a_MK.dtype
    if (mixed or units_for(a_MK)) and _fit(a_MK, b_KN, out_MN):
        _multiply_on(units_for(a_MK), a_MK, b_KN, out_MN, add=add)
    elif mixed:
        product = a_MK @ b_KN
        out_MN.add_(product) if add else out_MN.copy_(product)
    elif add:
        out_MN.addmm_(a_MK, b_KN)
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


class _OwnLinear(TorchFunctionMode):
    """PyTorch's own hook for replacing its functions: of one thread, and of whatever model runs in it."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and (len(args) == 2 or args[2] is None):
            return _linear(args[0], args[1], units_here())
        return function(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, units: Units) -> Tensor:
    """On such units if that is of use for these sizes."""
    rows = x.numel() // max(x.shape[-1], 1)
    fit = weight.ndim == 2 and x.dtype == torch.float32 and native.usable(x, weight)
    if not fit or not _pays(rows, weight.shape[0], weight.shape[1], units):
        return F.linear(x, weight)
    out_TF: Tensor = _Linear.apply(x.reshape(rows, -1), weight.contiguous(), units)
    return out_TF.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, units: Units) -> Tensor:
        x_TD = x_TD.contiguous()
        ctx.save_for_backward(x_TD, weight_FD)
        ctx.units = units
        return _product_on(units, x_TD, weight_FD.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD, weight_FD), dout_TF = ctx.saved_tensors, grads[0].contiguous()
        of_x, of_weight = wanted(ctx)
        return (
            _product_on(ctx.units, dout_TF, weight_FD) if of_x else None,
            _product_on(ctx.units, dout_TF.T, x_TD) if of_weight else None,
            None,
        )


def _pays(rows: int, columns: int, depth: int, units: Units) -> bool:
    if units == Units.TILES:
        return min(rows, columns, depth) >= _FEWEST_ON_TILES
    return rows * columns * depth >= _LEAST_ON_VECTORS


def _units_inside(weight: Tensor, *, tiles: bool) -> Units:
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return Units.BLAS
    if tiles and native.has_tiles():
        return Units.TILES
    return Units.VECTORS if native.has_fast_vectors() else Units.BLAS


def _fit(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> bool:
    return (
        out_MN.dtype == torch.float32
        and all(_dense(x) or _dense(x.T) for x in (a_MK, b_KN))
        and _dense(out_MN)
        and native.usable(a_MK, b_KN)
        and native.is_plain(out_MN)
    )


def _dense(x: Tensor) -> bool:
    """Whether rows lie one after another, perhaps with gaps between."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _product_on(units: Units, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    _multiply_on(units, a_MK, b_KN, out_MN, add=False)
    return out_MN


def _multiply_on(units: Units, a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool) -> None:
    """Of matrices that are dense in one of their dimensions each, ``out``, of fp32, in its last."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    native.call(
        "product", a_MK, *_layout(a_MK), b_KN, *_layout(b_KN), out_MN, out_MN.stride(0), m, n, k, int(add), int(units)
    )


def _layout(x: Tensor) -> tuple[int, int]:
    """Whether its first dimension is the dense one, and how far apart numbers are in the other."""
    rows, columns = x.shape
    # Of a single row or column the stride may be anything, which the BLAS would refuse.
    return (0, max(x.stride(0), columns)) if x.stride(1) == 1 else (1, max(x.stride(1), rows))
