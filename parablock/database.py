"""SQLite's files: how one is opened, and what its errors mean: damage of the file, or a refusal of the system."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BUSY_S = 60.0
DAMAGE = (sqlite3.Error, UnicodeDecodeError)  # as sqlite3 raises the latter where it quotes what it found
_REFUSALS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""What SQLite answers where the system refuses, which says nothing of what is in the file; and what we say then."""


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Transactions are begun and ended by the caller. Raises what is in `DAMAGE`, also where the system refuses."""
    # Whichever thread has opened it, another may write: the journal is appended to by the disk's.
    place = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    if read_only and not path.with_name(path.name + "-wal").exists():  # nobody writes: nothing need be written to read
        place += "&immutable=1"
    connection = sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
    try:
        connection.execute("PRAGMA synchronous = FULL")
    except DAMAGE:
        connection.close()
        raise
    return connection


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What SQLite says where it cannot write becomes an OSError."""
    try:
        yield
    except sqlite3.Error as error:
        raise refusal(path, error) from error


def refuses(error: sqlite3.Error) -> bool:
    """Whether it is the system that refuses, which says nothing of what is in the file."""
    return _primary(error) in _REFUSALS


def refusal(path: Path, error: sqlite3.Error) -> OSError:
    """The error that a refusal of the system is."""
    number = _REFUSALS.get(_primary(error), errno.EIO)
    return OSError(number, f"{os.strerror(number)} ({error})", str(path))


def _primary(error: sqlite3.Error) -> int:
    """SQLite's result code, without what extends it; −1 for an error of Python's own."""
    code: int = getattr(error, "sqlite_errorcode", -1)
    return code & 0xFF if code >= 0 else code
