"""Weights on huge pages: a decode step reads them all, and translating an address for every 4 KiB slows the reading."""

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

_HUGE_PAGE = 2 * 2**20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Ask Linux to put large tensors on the CPU on huge pages, where they are; where it will not, nothing changes."""
    for tensor in tensors:
        _use_huge_pages(tensor)


def _use_huge_pages(tensor: Tensor) -> None:
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, length, _MADV_HUGEPAGE)
        madvise(start, length, _MADV_COLLAPSE)
