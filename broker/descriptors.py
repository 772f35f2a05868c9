"""Descriptors of this process: as many as it may have, and one that is always there to take hold of a connection by.

Where there are no more, nothing can be duplicated any more either, least of all the connections that must go for there
to be some again. So a descriptor is set aside, and put in the place of one by `dup2`, which takes none.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 1 << 16 if sys.platform == "linux" else 10240  # macOS refuses more
Identity = tuple[int, int]
"""Device and inode: which socket it is, whatever its descriptor."""


def allowed() -> int:
    """How many this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def allow_all() -> int:
    """Let this process and its children have as many open as the system lets it, or 65,536; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if allowed() < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return allowed()


def identity(descriptor: int) -> Identity | None:
    """None where nothing has this descriptor."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Grip:
    """Takes hold of one connection at a time. Not thread-safe."""

    def __init__(self) -> None:
        self._nothing = os.open(os.devnull, os.O_RDONLY)
        self._descriptor = os.dup(self._nothing)

    @contextlib.contextmanager
    def hold(self, descriptor: int) -> Iterator[tuple[socket.socket, Identity] | None]:
        """The socket that has this descriptor now, and keeps being it meanwhile; None where there is none.

        What is no socket, as a file that was opened since, is not taken hold of at all: to let go of it would release
        the locks that SQLite has on it.
        """
        held = self._take(descriptor)
        try:
            found = identity(self._descriptor)
            assert found is not None
            yield None if held is None else (held, found)
        finally:
            if held is not None:
                held.detach()
            os.dup2(self._nothing, self._descriptor, inheritable=False)

    def _take(self, descriptor: int) -> socket.socket | None:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return None
            os.dup2(descriptor, self._descriptor, inheritable=False)
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=self._descriptor)
        except OSError:  # closed, or another thing by now
            return None

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._nothing)
