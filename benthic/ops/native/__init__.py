"""Kernels in C++ where PyTorch alone moves memory more often than it must; everything works without them.

They are compiled on first use with the machine's own compiler, for its own processor, on the BLAS inside PyTorch,
and kept in the user's cache directory. Where that fails, or ``BENTHIC_NATIVE=0`` is set, the pure PyTorch form of
each operation runs instead; :func:`status` says which. With ``BENTHIC_NATIVE=blas`` all products are the BLAS's.
"""

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from benthic.ops.native.build import BuildError, shared_library

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Argument = Tensor | int | float | None
_SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


def unhooked(operation: Callable[_P, _R]) -> Callable[_P, _R]:
    """What an operation does with tensors, past PyTorch's function modes, such as that of ``benthic.ops.product``.

    Those are asked at every attribute of a tensor, hundreds of times in a short prompt, and have no say in kernels.
    """

    @wraps(operation)
    def past_modes(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch._C.DisableTorchFunction():
            return operation(*args, **kwargs)

    return past_modes


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("BENTHIC_NATIVE", "1") == "0":
        return None, "PyTorch kernels (BENTHIC_NATIVE=0)"
    try:
        return ctypes.CDLL(str(shared_library())), "native kernels"
    except (BuildError, OSError) as error:
        return None, f"PyTorch kernels (no native ones: {error})"


@lru_cache(maxsize=1)
def decode_library() -> tuple[ctypes.CDLL | None, str]:
    """The library of whole decode steps, if it can be had here, and which form runs otherwise, and why."""
    if os.environ.get("BENTHIC_NATIVE", "1") == "0":
        return None, "PyTorch decoding (BENTHIC_NATIVE=0)"
    try:
        library = ctypes.CDLL(str(shared_library("decode")))
    except (BuildError, OSError) as error:
        return None, f"PyTorch decoding (no native one: {error})"
    library.decode_instruction_set.restype = ctypes.c_char_p
    return library, f"native decoding ({library.decode_instruction_set().decode()})"


@lru_cache(maxsize=1)
def memory_library() -> ctypes.CDLL | None:
    """The library that keeps the memory of large tensors, if it can be had here."""
    library = _optional("memory")
    if library is not None:
        library.use_arena.argtypes = [ctypes.c_int64]
    return library


@lru_cache(maxsize=1)
def fp8_library() -> ctypes.CDLL | None:
    """The library that quantises to FP8 and multiplies the outcome, if it can be had here."""
    return _optional("fp8")


def _optional(name: str) -> ctypes.CDLL | None:
    if os.environ.get("BENTHIC_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(shared_library(name)))
    except (BuildError, OSError):
        return None


def status() -> str:
    """Which kernels run on this machine and, if not the native ones, why."""
    return _load()[1]


@unhooked
def usable(*tensors: Tensor) -> bool:
    """Whether the native kernels exist and take these tensors: on the CPU, all fp32 or all bf16."""
    dtype = tensors[0].dtype
    if dtype not in _SUFFIX or not all(is_plain(t) and t.dtype == dtype for t in tensors):
        return False
    library = _load()[0]
    return library is not None and (dtype == torch.float32 or bool(library.has_bf16()))


def has_tiles() -> bool:
    """Whether this processor has bf16 tiles that products of fp32 may use (``benthic.ops.product``)."""
    library = _load()[0]
    return library is not None and os.environ.get("BENTHIC_NATIVE") != "blas" and bool(library.has_tiles())


def has_fast_vectors() -> bool:
    """Whether products are faster here by our own kernel than by the BLAS (``native/vector_gemm.cpp``)."""
    library = _load()[0]
    return library is not None and os.environ.get("BENTHIC_NATIVE") != "blas" and bool(library.has_fast_vectors())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in this process's memory, not one of PyTorch's stand-ins for them."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, Parameter)


@unhooked
def call(name: str, *arguments: _Argument) -> None:
    """Run a kernel for the dtype of the first argument.

    Tensors go as pointers, integers as int64, floats as fp32, None as a null pointer.
    """
    library, first = _load()[0], arguments[0]
    assert library is not None, "call usable() first"
    assert isinstance(first, Tensor)
    run(library, name + _SUFFIX[first.dtype], *arguments)


def run(library: ctypes.CDLL, symbol: str, *arguments: _Argument) -> None:
    """Run a kernel of any library, with arguments as :func:`call` takes them."""
    kernel = getattr(library, symbol)
    if kernel.argtypes is None:
        kernel.argtypes, kernel.restype = [_c_type(argument) for argument in arguments], None
    kernel(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def _c_type(argument: _Argument) -> type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float]:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int64
