"""Runs as real processes, for tests: `parablock run` to its end, or a broker and workers one by one."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

from parablock.run_folder import RunFolder

if TYPE_CHECKING:
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


def run(out: Path, workers: int = 2, **settings: object) -> subprocess.CompletedProcess[str]:
    """`parablock run` to its end."""
    overrides = [f"--set={key}={value}" for key, value in {**SMALL, **settings}.items()]
    command = [sys.executable, "-m", "parablock.cli", "run", "--workers", str(workers), "--out", str(out), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def finished(out: Path, **settings: object) -> RunFolder:
    done = run(out, **settings)
    assert done.returncode == 0, done.stderr
    return RunFolder.open(out)


def blocks(folder: RunFolder) -> dict[int, tuple[int, bytes]]:
    return {index: (version, values.tobytes()) for index, (version, values) in folder.load_blocks().items()}


class Processes:
    """A broker and workers started one by one; whatever is left is killed at the end."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.out = folder / "run"
        self.broker_log = folder / "broker.log"
        self.workers: list[subprocess.Popen[bytes]] = []
        self._logs = [self.broker_log.open("wb")]
        settings = {**SMALL, "network.bind": "tcp://127.0.0.1:*", **settings}
        overrides = [f"--set={key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "broker", "--out", str(self.out), *overrides]
        self.broker = subprocess.Popen(command, stdout=self._logs[0], stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.broker, *self.workers]:
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in self._logs:
            log.close()

    def endpoint(self) -> str:
        path = self.out / "endpoint"
        wait_for(path.exists)
        return path.read_text(encoding="utf-8").strip()

    def worker(self, index: int, *more: str, data: str = "builtin", endpoint: str = "") -> subprocess.Popen[bytes]:
        log = (self.folder / f"worker-{index}.log").open("wb")
        self._logs.append(log)
        command = [sys.executable, "-m", "workers", "--broker", endpoint or self.endpoint(), "--name", f"w{index}"]
        command += ["--data", data, "--shard", f"{index}/2", "--threads", "1", *more]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.workers.append(process)
        return process

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
