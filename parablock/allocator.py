"""What the C library does with memory that is given back: keep it, for the next chunk of the same size.

A transfer allocates and frees a message a chunk, and by default glibc returns much of that to the system at once, so
that each new message costs fresh pages, which the kernel clears one by one: more than all else that an exchange does
with the bytes (measured: README, Decisions). Process-wide, so only the programs call it, when they start.
"""

from __future__ import annotations

import ctypes
import logging
import platform

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc takes


def keep_freed_memory(*, arenas: int = 0) -> None:
    """arenas: pools that threads allocate from, 0 for glibc's own choice; with several, empty ones are given back.

    Elsewhere than on glibc nothing is done, and what is done there is not known.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    settings = [(_M_TRIM_THRESHOLD, 1 << 30), (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)]
    if arenas:
        settings.append((_M_ARENA_MAX, arenas))
    for name, value in settings:
        if not mallopt(name, value):
            log.warning("the C library refuses mallopt(%d, %d); transfers may be slower", name, value)
