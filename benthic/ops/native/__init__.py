"""Kernels in C++ where PyTorch alone moves memory more often than it must; everything works without them.

They are compiled on first use with the machine's own compiler, for its own processor, on the BLAS inside PyTorch,
and kept in the user's cache directory. Where that fails, or ``BENTHIC_NATIVE=0`` is set, the pure PyTorch form of
each operation runs instead; :func:`status` says which.
"""

import ctypes
import os
from functools import lru_cache

import torch
from torch import Tensor

from benthic.ops.native.build import BuildError, shared_library

_Argument = Tensor | int | float | None


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("BENTHIC_NATIVE", "1") == "0":
        return None, "PyTorch kernels (BENTHIC_NATIVE=0)"
    try:
        return ctypes.CDLL(str(shared_library())), "native kernels"
    except (BuildError, OSError) as error:
        return None, f"PyTorch kernels (no native ones: {error})"


def status() -> str:
    """Which kernels run on this machine and, if not the native ones, why."""
    return _load()[1]


def usable(*tensors: Tensor) -> bool:
    """Whether the native kernels exist and take these tensors: on the CPU, in fp32, outside autocast."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return plain and not torch.is_autocast_enabled("cpu") and _load()[0] is not None


def call(name: str, *arguments: _Argument) -> None:
    """Run a kernel: tensors go as pointers, integers as int64, floats as fp32, None as a null pointer."""
    library = _load()[0]
    assert library is not None, "call usable() first"
    getattr(library, name)(*map(_convert, arguments))


def _convert(argument: _Argument) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument)
