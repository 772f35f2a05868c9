"""Files that decide who is who: read only where nobody but their owner could have put them there, or read a secret.

What is looked at is what is read: the folder and the file are opened, asked whose they are, and read through the same
descriptors.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ExposedError(ValueError):
    """Others could read or change it. The message names it and says what to do."""


def read_guarded(path: Path) -> tuple[bytes, int]:
    """The content and the mode of a file in a folder that is nobody else's to look into.

    Raises ExposedError, and OSError where it cannot be read.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_folder(path.parent, os.fstat(folder))
        with open(path.name, "rb", opener=lambda name, flags: os.open(name, flags, dir_fd=folder)) as file:
            found = os.fstat(file.fileno())
            _check_owner(path, found)
            return file.read(), stat.S_IMODE(found.st_mode)
    finally:
        os.close(folder)


def check_mode(path: Path, mode: int, *, secret: bool) -> None:
    """secret: others may not read the file either. Raises ExposedError."""
    if secret and mode & 0o077:
        raise ExposedError(
            f"{path} may be read or changed by others (mode {mode:04o}), so it keeps no secret: "
            f"chmod 600 {path} if you are sure that nobody has, or make a new pair with `parablock keys new NAME`"
        )
    if mode & 0o022:
        raise ExposedError(f"{path} may be changed by others (mode {mode:04o}): chmod 600 {path}, and look at it")


def check_folder(folder: Path) -> None:
    """Raises ExposedError where others may look into it, OSError where it cannot be asked."""
    _check_folder(folder, os.stat(folder))


def _check_folder(folder: Path, found: os.stat_result) -> None:
    _check_owner(folder, found)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022:
        raise ExposedError(
            f"others may put their own files into the keys folder {folder} (mode {mode:04o}): chmod 700 {folder} if "
            "you are sure that nobody has, or make new keys in another --keys"
        )
    if mode & 0o077:
        raise ExposedError(f"others may look into the keys folder {folder} (mode {mode:04o}): chmod 700 {folder}")


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise ExposedError(
            f"{path} belongs to another user (number {found.st_uid}), who could change it: it is to be yours, or root's"
        )
