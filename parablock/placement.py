"""Files that take their place whole: written beside the old one and renamed, so a reader finds one or the other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace(temporary: Path, path: Path) -> None:
    """Put a file that is already on disk in its place, and the folder's entry on disk as well."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on disk. Raises OSError where the disk refuses."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str, *, synced: bool = True, mode: int | None = None) -> None:
    """Write a small file. synced: it survives a power cut, or else only the death of this process. mode: of the file,
    whatever the umask; None: as the umask has it.

    Raises OSError where the disk refuses; then the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "w", encoding="utf-8") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(text)
        if synced:
            file.flush()
            os.fsync(file.fileno())
    if synced:
        replace(temporary, path)
    else:
        os.replace(temporary, path)
