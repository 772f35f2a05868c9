"""Runs as real processes, for tests: `parablock run` to its end, or a broker and workers one by one.

`run` is the command as a user gives it: each of its processes is a fresh interpreter, and imports torch and
transformers for 4 s of a core. The processes of `Processes` are as real, with their own pid, signals, sockets and exit
codes, but forked by a server that has imported all that once. All compute on the CPU, whose bits the tests compare, and
since CUDA does not survive a fork.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

from broker.pairs import new_pair
from parablock.allow_list import allow
from parablock.invite import Invite
from parablock.keys import BROKER, PUBLIC, read_public
from parablock.run_folder import RunFolder

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from pathlib import Path

SMALL = {
    "rounds": 6,
    "solver.steps": 2,
    "solver.batch_size": 4,
    "solver.lr": 0.003,
    "eval.rows": 16,
    "eval.generate": 4,
    "eval.max_new_tokens": 8,
    "data.eval": "builtin",
    "network.chunk_bytes": 65536,
}

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["broker.server", "parablock.builtin", "workers.rounds", "workers.setup"])


def run(out: Path, workers: int = 2, **settings: object) -> subprocess.CompletedProcess[str]:
    """`parablock run` to its end."""
    overrides = [f"--set={key}={value}" for key, value in {**SMALL, **settings}.items()]
    command = [sys.executable, "-m", "parablock.cli", "run", "--workers", str(workers), "--out", str(out)]
    command += ["--device", "cpu", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def finished(folder: Path, **settings: object) -> RunFolder:
    """The run of a broker and two workers that `parablock run` would make of the same settings."""
    with Processes(folder, **settings) as processes:
        threads = max((os.cpu_count() or 1) // 2, 1)  # as `parablock run` shares out the cores
        workers = [processes.worker(index, "--eval", "builtin", "--threads", str(threads)) for index in range(2)]
        assert processes.broker.wait(timeout=120) == 0, processes.broker_log.read_text()
        assert [worker.wait(timeout=30) for worker in workers] == [0, 0]
    return RunFolder.open(processes.out)


def blocks(folder: RunFolder) -> dict[int, tuple[int, bytes]]:
    return {index: (version, values.tobytes()) for index, (version, values) in folder.load_blocks().items()}


class Process:
    """`python -m MODULE ARGUMENTS` as a child of the fork server, with what the tests use of `subprocess.Popen`."""

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        log.touch()  # so that it can be read at once
        self._process = _FORKS.Process(target=_main, args=(module, arguments, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus a signal's number where one has ended the process; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"process {self.pid} still runs after {timeout} s"
        return code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _main(module: str, arguments: list[str], log: Path) -> None:
    """What a forked process does: `sys.exit(main())` of the module, with all its output in the log."""
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [module, *arguments]
    sys.exit(importlib.import_module(f"{module}.__main__").main())


class Processes:
    """A broker and workers started one by one; whatever is left is killed at the end."""

    def __init__(self, folder: Path, keys: Path | None = None, **settings: object) -> None:
        """keys: those of other processes; None: new ones."""
        self.folder = folder
        self.out = folder / "run"
        self.broker_log = folder / "broker.log"
        self.workers: list[Process] = []
        self.keys = keys or folder / "keys"
        if keys is None:
            new_pair(self.keys, BROKER)
            for index in range(3):
                allow(self.keys, new_pair(self.keys, f"worker-{index}"), "the test's beginning")
        self.invite = folder / "invite.toml"
        broker = read_public(self.keys / f"{BROKER}{PUBLIC}")
        Invite("tcp://127.0.0.1:9", broker.key).write(self.invite)  # where the broker listens, workers are told
        settings = {**SMALL, "network.bind": "tcp://127.0.0.1:*", **settings}
        overrides = [f"--set={key}={value}" for key, value in settings.items()]
        self.broker = Process("broker", ["--out", str(self.out), *self._with_keys, *overrides], self.broker_log)

    def resume(self, **settings: object) -> None:
        """Another broker in the place of the one that has ended."""
        assert self.broker.poll() is not None
        overrides = [f"--set={key}={value}" for key, value in settings.items()]
        self.broker = Process("broker", ["--resume", str(self.out), *self._with_keys, *overrides], self.broker_log)

    @property
    def _with_keys(self) -> tuple[str, ...]:
        return ("--keys", str(self.keys))

    def contact(self, index: int) -> tuple[str, ...]:
        """With what worker `index` is let in, wherever the broker listens."""
        return "--invite", str(self.invite), "--key", str(self.keys / f"worker-{index}.secret")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.broker, *self.workers]:
            if process.poll() is None:
                process.kill()
            process.wait()

    def endpoint(self) -> str:
        path = self.out / "endpoint"
        wait_for(path.exists)
        return path.read_text(encoding="utf-8").strip()

    def worker(self, index: int, *more: str, data: str = "builtin", endpoint: str = "") -> Process:
        arguments = ["--broker", endpoint or self.endpoint(), *self.contact(index)]
        arguments += ["--data", data, "--shard", f"{index % 2}/2", "--threads", "1", "--device", "cpu"]
        arguments += ["--state", str(self.folder / f"state-{index}"), *more]
        self.workers.append(Process("workers", arguments, self.folder / f"worker-{index}.log"))
        return self.workers[-1]

    def folder_of_run(self) -> RunFolder:
        return RunFolder.open(self.out)

    def said(self, index: int) -> str:
        return (self.folder / f"worker-{index}.log").read_text(encoding="utf-8", errors="replace")


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
