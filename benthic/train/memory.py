"""What a process does once, so that training steps need not wait for memory, nor hold more of it than they use.

Freed memory is kept for the next step instead of going back to the system: a step allocates and frees the same
hundreds of megabytes each time. glibc maps every large block anew and unmaps it when it is freed, so that each step
pays for the system to hand out and zero the same pages again. Large tensors are kept in an arena of our own
(``ops/native/memory``), for glibc's heap leaves holes between them that nothing fits into: a third of a small step's
memory. Where the arena cannot be compiled, glibc is told to keep what is freed.

Python's collector, too, would go through the hundreds of thousands of objects that libraries made when they were
imported, again and again; of a step of a small model that was a thirtieth.
"""

import ctypes
import gc
import os
import platform
from functools import cache

from benthic.ops import native

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD_BYTES = 64 * 2**20


@cache
def settle_memory() -> None:
    """Prepare this process for training steps: freed memory is kept, and what lives by now is no more collected.

    The first half needs a C++ compiler or glibc, and is left out where there is neither.
    """
    gc.collect()
    gc.freeze()
    _keep_freed_memory()
    keep_large_tensors()


def keep_large_tensors() -> bool:
    """From now on, large tensors of this process lie in an arena; False where there is none. Until the process ends."""
    library = native.memory_library()
    return library is not None and bool(library.use_arena(_physical_bytes()))


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _keep_freed_memory() -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
