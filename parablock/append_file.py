"""A file that only grows, by whole records: an append is there entirely or, where the disk refuses, not at all. Only a
writer that was killed can leave a part of one, which `cut_torn_line` drops."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path


class AppendFile:
    """Unbuffered, so that what `append` has returned from is in the kernel's hands, and a failed one leaves nothing."""

    def __init__(self, path: Path, *, truncate: bool = False) -> None:
        """Raises OSError where `path` cannot be opened. truncate: start anew."""
        self._file = path.open("wb" if truncate else "ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def append(self, text: str) -> None:
        """Add `text` as UTF-8. Raises OSError, and takes back what was written of it, where the disk is full."""
        data = text.encode()
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        except OSError:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        self._file.close()


def cut_torn_line(path: Path) -> int:
    """Drop what a killed writer left after the last newline, or the next line would be glued to it.

    Returns how many bytes that were. Raises OSError.
    """
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
    return len(content) - whole
