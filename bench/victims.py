"""A process that is killed, stopped and started again, and how it ended each time.

Unlike `bench.processes.Children`, an end is nothing to fail about here: it is written down, and `bench.invariants`
says which ends were to be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.invariants import Exit
from bench.processes import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


@dataclass
class Victim:
    """command: of its first process, and of each later one. log: all of them write to it, one after the other."""

    name: str
    command: Callable[[bool], Sequence[str]]
    """Given whether it has run before."""
    log: Path
    env: Mapping[str, str]
    starts: list[float] = field(default_factory=list)
    """When each of its processes was started: time.monotonic."""
    kills: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _killed: bool = False

    @property
    def runs(self) -> bool:
        """Whether it has a process, which may be stopped; one that ended and was not looked at is one still."""
        return self._process is not None

    def start(self) -> None:
        assert self._process is None
        command = self.command(bool(self.starts))
        with self.log.open("ab") as output:
            self.starts.append(time.monotonic())
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        self._killed = False

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone, stopped or not."""
        assert self._process is not None
        if self._process.poll() is None:
            self._killed = True
            self.kills += 1
            self._signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `stop`; of no effect on a process that was started since."""
        self._signal(signal.SIGCONT)

    def ended(self, *, complete: bool) -> Exit | None:
        """How its process ended, once for each; None while it runs."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        self._process = None
        return Exit(self.name, code, self._killed, complete)

    def story(self) -> str:
        """The last lines that it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:] if self.log.exists() else []
        return f"  {self.name}, the end of its log:\n" + "\n".join(f"    {line}" for line in lines)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)
