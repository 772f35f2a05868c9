"""What the C library does with memory that is given back: keep it, for the next chunk of the same size.

A transfer allocates and frees a message a chunk, and a round some vectors of a block's size. By default glibc returns
much of that to the system at once, so that it costs fresh pages again, which the kernel clears one by one: more than
all else that an exchange does with the bytes. And it gives threads pools of their own, so that what one has freed does
not serve another: a block or two, in a worker (both measured: README, Decisions). Process-wide, so only the programs
call it, when they start.
"""

from __future__ import annotations

import ctypes
import logging
import platform

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_NEVER = -1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc takes


def keep_freed_memory() -> None:
    """One pool for all threads, of which nothing is returned. What does not fit in and has more than 32 MiB is mapped
    by itself, and goes back.

    Elsewhere than on glibc nothing is done, and what is done there is not known.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for name, value in ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, _NEVER), (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)):
        if not mallopt(name, value):
            log.warning("the C library refuses mallopt(%d, %d); transfers may be slower", name, value)
