"""The lock of a run's folder: at most one live broker, and it says which.

It is the kernel's (`flock`), so that it goes with the process that holds it, however that ends; the file `lock` only
says whose it is. A file that a dead process has left locks nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NAME = "lock"


class LockedError(ValueError):
    """Somebody else holds the lock. The message says who."""


class FolderLock:
    """Held from its making to `release`, or to the end of the process."""

    def __init__(self, folder: Path, since: str) -> None:
        """since: the present time, for people. Raises LockedError, and OSError where the disk refuses."""
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = {"pid": os.getpid(), "host": platform.node(), "since": since}
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(owner).encode() + b"\n")
        except BlockingIOError as error:
            owner_text = _owner(self._file)
            os.close(self._file)
            raise LockedError(
                f"{folder} is in use by {owner_text}; stop that first, or wait until it has ended"
            ) from error
        except OSError:
            os.close(self._file)
            raise

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


def _owner(file: int) -> str:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return f"a broker (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (ValueError, KeyError, TypeError):
        return "a broker that has just begun"
