"""What a process does once, so that training steps need not wait for memory.

Freed memory is kept for the next step instead of going back to the system: a step allocates and frees the same
hundreds of megabytes each time. glibc maps every large block anew and unmaps it when it is freed, so that each step
pays for the system to hand out and zero the same pages again.

Python's collector, too, would go through the hundreds of thousands of objects that libraries made when they were
imported, again and again; of a step of a small model that was a thirtieth.
"""

import ctypes
import gc
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD_BYTES = 64 * 2**20


@cache
def settle_memory() -> None:
    """Prepare this process for training steps: freed memory is kept, and what lives by now is no more collected.

    The first half needs glibc, and is left out where the C library is another.
    """
    gc.collect()
    gc.freeze()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
