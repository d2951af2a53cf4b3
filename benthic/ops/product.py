"""Products of fp32 on the processor's bf16 tiles, for those who ask for them: as exact as fp32, and mostly faster.

A number of fp32 is the sum of three of bf16; of the nine products of two such sums, the six that matter in fp32 are
computed (``native/amx.cpp``). Results differ from PyTorch's in the last bits, and on machines shared with others the
tiles are slow at times, so nothing is multiplied so unless it runs inside of :func:`on_tiles`, as the engine's prompts
do, and training where ``precision.compute`` says so.

Dimensions: T rows, D in, F out; M, N and K of any product.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from benthic.ops import native
from benthic.ops.wanted import wanted

_FEWEST = 32
"""Rows, columns and numbers summed over that a linear layer on tiles has at least."""


class _Wanted(threading.local):
    tiles = False


_wanted = _Wanted()


def tiles_wanted() -> bool:
    """Whether the calling thread is inside of :func:`on_tiles`, on a machine that has tiles."""
    return _wanted.tiles


def kernels_on_tiles(weight: Tensor) -> str:
    """For reports: which kernels compute with such weights inside of :func:`on_tiles`."""
    if weight.device.type != "cpu":
        return f"PyTorch kernels (on {weight.device.type})"
    return f"{native.status()}, fp32 on bf16 tiles" if _has_use(weight) else native.status()


@contextmanager
def on_tiles(weight: Tensor) -> Iterator[None]:
    """Inside, and in this thread alone, large products of fp32 run on tiles where the machine has them.

    Those are linear layers, whatever module calls ``torch.nn.functional.linear``, and the native kernels of attention,
    experts and cross-entropy. What is computed forward so is computed so backward too, inside or not. It does nothing
    under autocast.

    Args:
        weight: one of those to multiply by; unless they are fp32 and on the CPU there is nothing to do.
    """
    if torch.is_autocast_enabled("cpu") or not _has_use(weight):
        yield
        return
    before, _wanted.tiles = _wanted.tiles, True
    try:
        with _LinearOnTiles():
            yield
    finally:
        _wanted.tiles = before


def linear_as_here() -> Callable[..., Tensor]:
    """A linear layer without bias that multiplies as one would where this is called, wherever it runs itself."""
    return _linear_on_tiles if tiles_wanted() else F.linear


def multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, on tiles if they are wanted; ``a`` and ``b`` may be transposed."""
    if tiles_wanted() and _fit(a_MK, b_KN, out_MN):
        _multiply_on_tiles(a_MK, b_KN, out_MN, add=add)
    elif add:
        out_MN.addmm_(a_MK, b_KN)
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


class _LinearOnTiles(TorchFunctionMode):
    """PyTorch's own hook for replacing its functions: of one thread, and of whatever model runs in it."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and (len(args) == 2 or args[2] is None):
            return _linear_on_tiles(*args[:2])
        return function(*args, **(kwargs or {}))


def _linear_on_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """On tiles if that is of use for such sizes."""
    rows = x.numel() // max(x.shape[-1], 1)
    if (
        weight.ndim != 2
        or min(rows, *weight.shape) < _FEWEST
        or not native.usable(x, weight)
        or x.dtype != torch.float32
    ):
        return F.linear(x, weight)
    out_TF: Tensor = _Linear.apply(x.reshape(rows, -1), weight.contiguous())
    return out_TF.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
        x_TD = x_TD.contiguous()
        ctx.save_for_backward(x_TD, weight_FD)
        return _product_on_tiles(x_TD, weight_FD.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD, weight_FD), dout_TF = ctx.saved_tensors, grads[0].contiguous()
        of_x, of_weight = wanted(ctx)
        return (
            _product_on_tiles(dout_TF, weight_FD) if of_x else None,
            _product_on_tiles(dout_TF.T, x_TD) if of_weight else None,
        )


def _has_use(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and native.has_tiles()


def _fit(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> bool:
    three = a_MK, b_KN, out_MN
    return (
        all(x.dtype == torch.float32 and (_dense(x) or _dense(x.T)) for x in three)
        and _dense(out_MN)
        and native.usable(*three)
    )


def _dense(x: Tensor) -> bool:
    """Whether rows lie one after another, perhaps with gaps between."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


def _product_on_tiles(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    _multiply_on_tiles(a_MK, b_KN, out_MN, add=False)
    return out_MN


def _multiply_on_tiles(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool) -> None:
    """Of matrices that are dense in one of their dimensions each, ``out`` in its last."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    native.call("product", a_MK, *_layout(a_MK), b_KN, *_layout(b_KN), out_MN, out_MN.stride(0), m, n, k, int(add))


def _layout(x: Tensor) -> tuple[int, int]:
    """Whether its first dimension is the dense one, and how far apart numbers are in the other."""
    return (0, x.stride(0)) if x.stride(1) == 1 else (1, x.stride(1))
