"""What a process uses: CPU seconds and memory, of itself, and how many files it may open.

Linux only, as the kernel links are.
"""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # see proc_pid_clear_refs(5)


def cpu_s() -> float:
    """User and system seconds of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def allow_files(count: int) -> None:
    """Let this process and its children have `count` files (sockets too) open. Raises ValueError where they may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    if hard < count:
        raise ValueError(
            f"{count} open files are needed, {hard} are allowed; raise the limit (ulimit -Hn), or ask less"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class Memory:
    """Resident memory above what the process had when this was made, its largest value since then. In bytes."""

    def __init__(self) -> None:
        _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")  # imports may have needed more than they left
        self.base = _resident("VmRSS")

    def peak(self) -> int:
        return _resident("VmHWM") - self.base


def _resident(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"the kernel tells no {name} in {_STATUS}")
