"""The lock of a folder, a run's or a worker's own: at most one process at work in it, and it says which.

It is the kernel's (`flock`), so that it goes with the process that holds it, however that ends; the file `lock` only
says whose it is. A file that a dead process has left locks nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NAME = "lock"

_TRIES, _PAUSE_S = 50, 0.01
"""`holder` can only ask by sharing the lock for some microseconds, and whoever wants it then tries again."""

_UNNAMED = "a process that has not said which it is"


class LockedError(ValueError):
    """Somebody else holds the lock. The message says who."""


class FolderLock:
    """Held from its making to `release`, or to the end of the process."""

    def __init__(self, folder: Path, since: str = "", kind: str = "a broker", *, private: bool = False) -> None:
        """since: the present time, and kind: what this process is, for people. private: nobody else's to read.

        Raises LockedError, after half a second in which nobody has let go, and OSError where the disk refuses.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(folder / NAME, flags, 0o600 if private else 0o644)
        try:
            if not _taken(self._file):
                raise LockedError(
                    f"{folder} is in use by {_owner(self._file)}; stop that first, or wait until it has ended"
                )
        except BaseException:
            os.close(self._file)
            raise
        owner = {"kind": kind, "pid": os.getpid(), "host": platform.node(), "since": since}
        with contextlib.suppress(OSError):  # on a full disk the lock holds too, and only does not say whose it is
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(owner).encode() + b"\n")

    def release(self) -> None:
        """Releasing again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def holder(folder: Path) -> str | None:
    """Who holds the lock of a folder just now; None: nobody."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _owner(file)
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    for _ in range(_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        else:
            return True
    return False


def _owner(file: int) -> str:
    try:
        note = json.loads(os.pread(file, 4096, 0))
        if note["host"] == platform.node() and not _alive(note["pid"]):  # what an earlier holder has left
            return _UNNAMED
        since = f", since {note['since']}" if note["since"] else ""
        return f"{note['kind']} (process {note['pid']} on {note['host']}{since})"
    except (ValueError, KeyError, TypeError):
        return _UNNAMED


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
