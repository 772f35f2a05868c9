"""The child processes of a benchmark: started with a log each, watched together, and never left behind.

A child gets a session of its own, so that Ctrl-C reaches only the benchmark, which then ends its children group
by group; should the benchmark itself be killed, the kernel kills them. What they do is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

POLL_S = 0.1
"""Between two looks at what the children do."""

_GRACE_S = 5.0
_TAIL_LINES = 30


class ChildError(RuntimeError):
    """A child failed or stopped getting anywhere. The message holds the end of its log."""


@dataclass(frozen=True)
class Child:
    """A started process; stdout and stderr go to `log`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def story(self) -> str:
        """The last lines that it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        body = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
        return f"  {self.name}, the end of its log:\n{body}"


class Children:
    """Processes that end when the `with` block does, however it ends. `logs` is a folder that exists."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)
        for child in self._children:
            child.process.wait()

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
        """Start `command`, `env` added to this process's environment. Raises OSError where it cannot run."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def wait(self, child: Child, progress: Callable[[], object], patience_s: float) -> None:
        """Wait until `child` has ended with exit code 0.

        Raises ChildError as soon as any child ends otherwise, and when `progress()` has given the same answer
        for `patience_s` seconds.
        """
        for _ in self.watch(child, progress, patience_s):
            time.sleep(POLL_S)

    def watch(self, child: Child, progress: Callable[[], object], patience_s: float) -> Iterator[None]:
        """As `wait`, a look at each turn, for whoever watches others meanwhile: ends when `child` has ended well."""
        seen, since = progress(), time.monotonic()
        while child.process.poll() is None:
            self._check()
            now = time.monotonic()
            if (state := progress()) != seen:
                seen, since = state, now
            elif now - since > patience_s:
                stories = "\n".join(each.story() for each in self._children)
                raise ChildError(f"nothing moved for {patience_s:g} s\n{stories}")
            yield
        self._check()

    def until(self, condition: Callable[[], bool], patience_s: float) -> None:
        """Wait until `condition()` holds. Raises ChildError where a child fails first, or after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while not condition():
            self._check()
            if time.monotonic() > deadline:
                stories = "\n".join(each.story() for each in self._children)
                raise ChildError(f"not ready after {patience_s:g} s\n{stories}")
            time.sleep(POLL_S / 5)

    def _check(self) -> None:
        failed = [child for child in self._children if child.process.poll() not in (None, 0)]
        if failed:
            codes = ", ".join(f"{child.name} ended: {_how(child.process.returncode)}" for child in failed)
            raise ChildError(codes + "\n" + "\n".join(child.story() for child in failed))

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            # The group may have members although its leader has ended.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, number)


def size(path: Path) -> int:
    """Bytes of a file that may not be there yet (0): what grows shows that a run gets on."""
    return path.stat().st_size if path.exists() else 0


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


_PR_SET_PDEATHSIG = 1
# Looked up before any fork: another thread may hold the loader's lock at that moment.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In the child, before it becomes the command: have the kernel kill it when its parent dies."""
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
