"""The lock of a run's folder: one broker at a time, who it is, and none after its holder's death however that came."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from parablock import folder_lock
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
    with pytest.raises(LockedError, match="in use by a process that has not said which it is"):
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


def test_asking_who_holds_it_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    asking = os.open(tmp_path / "lock", os.O_RDONLY)  # as `holder` does, at the worst moment
    fcntl.flock(asking, fcntl.LOCK_SH)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            os.close(asking)

    monkeypatch.setattr(time, "sleep", wait)
    FolderLock(tmp_path, "noon").release()
    assert len(waited) == 3


def test_what_a_dead_process_has_written_names_nobody(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    lock = FolderLock(tmp_path, "noon")
    note = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(note | {"pid": dead.pid}))  # until the new holder has said who it is
    assert holder(tmp_path) == "a process that has not said which it is"
    (tmp_path / "lock").write_text(json.dumps(note | {"pid": dead.pid, "host": "another"}))
    assert f"a broker (process {dead.pid} on another, " in (holder(tmp_path) or ""), "who can tell from here"
    (tmp_path / "lock").write_text("17\n")
    assert holder(tmp_path) == "a process that has not said which it is"
    lock.release()


def test_the_kind_of_holder_is_told(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "noon", "parablock gc")
    assert (holder(tmp_path) or "").startswith(f"parablock gc (process {os.getpid()} ")
    lock.release()


def test_a_full_disk_keeps_nobody_from_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_lock.os, "write", full)
    lock = FolderLock(tmp_path, "noon")
    assert holder(tmp_path) == "a process that has not said which it is"
    lock.release()
