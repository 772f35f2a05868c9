"""The lock of a run's folder: one broker at a time, who it is, and none after its holder's death however that came."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from parablock.folder_lock import FolderLock, LockedError, holder

if TYPE_CHECKING:
    from pathlib import Path


def test_a_second_one_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    lock = FolderLock(tmp_path, "2026-11-26 05:00 UTC")
    whom = f"a broker \\(process {os.getpid()} on .+, since 2026-11-26 05:00 UTC\\)"
    with pytest.raises(LockedError, match=f"is in use by {whom}; stop that first"):
        FolderLock(tmp_path, "later")
    assert "since 2026-11-26 05:00 UTC" in (holder(tmp_path) or "")
    lock.release()
    lock.release()
    assert holder(tmp_path) is None
    FolderLock(tmp_path, "later").release()


def test_a_holder_that_has_not_said_who_it_is_holds_it_too(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "noon")
    (tmp_path / "lock").write_text("")
    with pytest.raises(LockedError, match="in use by a broker that has just begun"):
        FolderLock(tmp_path, "later")
    lock.release()


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from parablock.folder_lock import FolderLock\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]), 'noon'); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert f"process {process.pid} " in (holder(tmp_path) or "")
        with pytest.raises(LockedError, match=f"process {process.pid} "):
            FolderLock(tmp_path, "later")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "lock").exists(), "its file is still there, and locks nothing"
    assert holder(tmp_path) is None
    FolderLock(tmp_path, "later").release()
