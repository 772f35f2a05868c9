"""What a process uses: CPU seconds, memory, files, threads and tasks, of itself, and how many files it may open.

Linux only, as the kernel links are.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from pathlib import Path

from broker import descriptors
from parablock.append_file import AppendFile

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FILES = Path("/proc/self/fd")
_THREADS = Path("/proc/self/task")
_FORGET_PEAK = "5"  # see proc_pid_clear_refs(5)


def cpu_s() -> float:
    """User and system seconds of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def allow_files(count: int) -> None:
    """Let this process and its children have `count` files (sockets too) open. Raises ValueError where they may not."""
    allowed = descriptors.allow_all()
    if allowed < count:
        raise ValueError(
            f"{count} open files are needed, {allowed} are allowed; raise the limit (ulimit -Hn), or ask less"
        )


class Memory:
    """Resident memory above what the process had when this was made, its largest value since then. In bytes."""

    def __init__(self) -> None:
        _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")  # imports may have needed more than they left
        self.base = _resident("VmRSS")

    def peak(self) -> int:
        return _resident("VmHWM") - self.base


class Watch:
    """What this process holds, written down round by round: resident memory, memory blocks that Python has given out
    (`sys.getallocatedblocks`, which pages do not blur), open files, threads (ZeroMQ's too), tasks of the loop.

    Straight to a file, and nothing is kept: a watch that grows would find itself.
    """

    def __init__(self, path: Path) -> None:
        self._file = AppendFile(path, truncate=True)

    def look(self, round: int) -> None:
        """On the event loop, after `round`."""
        row = {
            "round": round,
            "resident_bytes": _resident("VmRSS"),
            "objects": sys.getallocatedblocks(),
            "files": len(os.listdir(_FILES)) - 1,  # the listing has one open itself
            "threads": len(os.listdir(_THREADS)),
            "tasks": len(asyncio.all_tasks()),
        }
        self._file.append(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def _resident(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"the kernel tells no {name} in {_STATUS}")
