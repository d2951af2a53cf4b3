"""Products of fp32 on the processor's bf16 tiles, for those who ask for them: as exact as fp32, and mostly faster.

A number of fp32 is the sum of three of bf16; of the nine products of two such sums, the six that matter in fp32 are
computed (``native/amx.cpp``). Results differ from PyTorch's in the last bits, and on machines shared with others the
tiles are slow at times, so nothing is multiplied so unless it runs inside of :func:`on_tiles`: the engine reads prompts
there, training never does.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benthic.ops import native

_FEWEST = 32
"""Rows, columns and numbers summed over that a product on tiles has at least."""


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

    Those are linear layers, whatever module calls ``torch.nn.functional.linear``, and the native kernels of attention
    and experts. It is for computing without gradients, and does nothing where these are recorded or under autocast.

    Args:
        weight: one of those to multiply by; unless they are fp32 and on the CPU there is nothing to do.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not _has_use(weight):
        yield
        return
    before, _wanted.tiles = _wanted.tiles, True
    try:
        with _LinearOnTiles():
            yield
    finally:
        _wanted.tiles = before


class _LinearOnTiles(TorchFunctionMode):
    """PyTorch's own hook for replacing its functions: of one thread, and of whatever model runs in it."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and (len(args) == 2 or args[2] is None) and _fits(*args[:2]):
            return _linear(*args[:2])
        return function(*args, **(kwargs or {}))


def _has_use(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and native.has_tiles()


def _fits(x: Tensor, weight_FD: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and min(x.numel() // max(x.shape[-1], 1), *weight_FD.shape) >= _FEWEST
        and native.usable(x, weight_FD)
    )


def _linear(x: Tensor, weight_FD: Tensor) -> Tensor:
    x, weight_FD = x.contiguous(), weight_FD.contiguous()
    out, (outputs, inputs) = x.new_empty(*x.shape[:-1], weight_FD.shape[0]), weight_FD.shape
    native.call("product", x, 0, inputs, weight_FD, 1, inputs, out, outputs, out.numel() // outputs, outputs, inputs, 0)
    return out
