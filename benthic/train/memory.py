"""Freed memory is kept for the next step instead of going back to the system.

A training step allocates and frees the same hundreds of megabytes each time. glibc maps every large block anew and
unmaps it when it is freed, so that each step pays for the system to hand out and zero the same pages again.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> None:
    """Tell this process's allocator to keep what is freed; nothing where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
