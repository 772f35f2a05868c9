"""`keys/` in a run's folder: the pairs that `parablock run` makes for one run, and deletes when that is complete.

A user may have a folder of that name there, with keys that are nowhere else. So one of ours has a file that says so,
and names whose keys we have put there. Without it nothing is taken from the folder, and nothing is deleted but what it
names.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from parablock import allow_list, folder_lock
from parablock.keys import PUBLIC, SECRET
from parablock.messages import NAME
from parablock.placement import write_text
from parablock.run_folder import KEYS, RunFolderError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MARK = "throw-away"


def mark(folder: Path, names: Sequence[str]) -> None:
    """Say that the folder is ours, before anything else is in it. Raises OSError where the disk refuses."""
    write_text(folder / MARK, "".join(f"{name}\n" for name in names))


def throw_away_keys(run: Path) -> Path | None:
    """The keys folder of a run that `parablock run` has begun; None where there is none, or it is the user's own."""
    folder = run / KEYS
    return folder if _names(folder) is not None else None


def check_ours(folder: Path, otherwise: str) -> None:
    """Raise RunFolderError where there is a folder that is not ours. otherwise: what to do then."""
    if (folder.exists() or folder.is_symlink()) and _names(folder) is None:
        raise RunFolderError(f"{folder} is there and is not of a run; {otherwise}")


def remove(folder: Path) -> None:
    """Delete what is ours, if the folder is; and the folder, unless something else is in it. Raises OSError where the
    disk refuses."""
    names = _names(folder)
    if names is None:
        return
    files = [allow_list.FILE, folder_lock.NAME, *(f"{name}{kind}" for name in names for kind in (SECRET, PUBLIC))]
    for file in files:
        for path in (folder / file, *folder.glob(f".{file}.*")):  # the latter where a process was killed in writing
            path.unlink(missing_ok=True)
    (folder / MARK).unlink()  # the last one: until then it is known what may be deleted
    with contextlib.suppress(OSError):  # somebody's own files are in it
        folder.rmdir()


def _names(folder: Path) -> list[str] | None:
    """Whose keys we have put there; None where the folder is not ours."""
    path = folder / MARK
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    names = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return names if all(re.fullmatch(NAME, name) for name in names) else None
