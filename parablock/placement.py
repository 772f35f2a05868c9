"""Files that take their place whole: written beside the old one and renamed, so a reader finds one or the other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace(temporary: Path, path: Path) -> None:
    """Put a file that is already on disk in its place, and the folder's entry on disk as well."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the folder's entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, synced: bool = True) -> None:
    """Write a small file. synced: it survives a power cut, or else only the death of this process.

    Raises OSError where the disk refuses; then the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if synced:
            file.flush()
            os.fsync(file.fileno())
    if synced:
        replace(temporary, path)
    else:
        os.replace(temporary, path)
