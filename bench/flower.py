"""Flower's exchange as its users run it: a SuperLink, a SuperNode per client, and an app that only exchanges.

Its own processes, from the environment of a Python that has flwr (which is mostly another one than ours: its pins and
ours exclude each other), without TLS, as the other side has none. The app is `bench.flower_app`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from bench.figures import FiguresError
from bench.network import free_port
from bench.processes import Children

PATIENCE_S = 300.0
"""A round that takes longer has failed."""

_START_S = 60.0
"""The SuperLink listens within this time, and the submission of a run takes no longer."""

INSTALL = (
    "python3 -m venv flower && echo 'setuptools<81' > flower/build.txt && "
    "PIP_CONSTRAINT=flower/build.txt flower/bin/pip install 'flwr==1.42.0' numpy"
)
"""setuptools: a dependency of flwr is built from source with what later ones have dropped."""

_APP = Path(__file__).with_name("flower_app.py")

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "exchange"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "parablock"

[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"

[tool.flwr.app.config]
report = "{report}"
clients = {clients}
block-bytes = {block_bytes}
rounds = {rounds}
"""

_CONNECTION = """\
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


class FlowerError(ValueError):
    """Flower cannot be run. The message says what to install."""


def version(python: Path) -> str:
    """The version of flwr that `python` has. Raises FlowerError where there is none."""
    asked = "from importlib.metadata import version; print(version('flwr'))"
    try:
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    except OSError as error:
        raise FlowerError(f"cannot run {python}: {error.strerror}; name a Python that has flwr") from error
    if done.returncode or not _program(python, "flower-superlink").exists():
        raise FlowerError(
            f"Flower is not installed for {python}. It needs an environment of its own:\n    {INSTALL}\n"
            "then add --flower-python flower/bin/python"
        )
    return done.stdout.strip()


def measure(python: Path, clients: int, block_bytes: int, rounds: int, warm_up: int, folder: Path) -> list[float]:
    """Seconds of each round after the warm-up: from the strategy's first step to the mean it has made.

    folder: for logs and what Flower keeps. Raises ChildError where a process fails or a round does not end,
    FiguresError where a round missed a client.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="flower-") as temporary:
        place = Path(temporary)
        report, app, home = place / "report.json", place / "app", place / "home"
        app.mkdir()
        home.mkdir()
        shutil.copy(_APP, app)
        text = _PYPROJECT.format(report=report, clients=clients, block_bytes=block_bytes, rounds=rounds)
        (app / "pyproject.toml").write_text(text, encoding="utf-8")
        port = free_port()
        (home / "config.toml").write_text(_CONNECTION.format(port=port), encoding="utf-8")
        environment = {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{_program(python, '')}:/usr/bin:/bin",  # where it finds its own programs
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",
        }
        with contextlib.ExitStack() as stack:
            stack.callback(_end, home)
            children = stack.enter_context(Children(place))
            link = [
                str(_program(python, "flower-superlink")),
                "--insecure",
                "--disable-runtime-dependency-installation",
            ]
            children.start("superlink", [*link, "--host", "127.0.0.1", "--port", str(port)], environment)
            children.until(lambda: _listens(port), _START_S)
            for index in range(clients):
                node = [str(_program(python, "flower-supernode")), "--insecure", "--superlink", f"127.0.0.1:{port}"]
                children.start(f"supernode-{index}", [*node, "--port", str(free_port())], environment)
            submit = [str(_program(python, "flwr")), "run", str(app), "bench"]
            children.wait(children.start("run", submit, environment), lambda: None, _START_S)
            for round in range(rounds):
                children.until(lambda done=round: len(_rows(report)) > done, PATIENCE_S)
        return round_s(_rows(report), clients, warm_up)


def round_s(rows: list[tuple[int, int, float, float]], clients: int, warm_up: int) -> list[float]:
    """The times in the rows of `bench.flower_app.Timed`, after the warm-up."""
    for number, results, _, _ in rows:
        if results != clients:
            raise FiguresError(f"Flower's round {number} has {results} results of {clients} clients; run it again")
    return [ended - began for _, _, began, ended in rows[warm_up:]]


def _rows(report: Path) -> list[tuple[int, int, float, float]]:
    return [tuple(row) for row in json.loads(report.read_text(encoding="utf-8"))] if report.exists() else []


def _program(python: Path, name: str) -> Path:
    """A program beside `python`, which may be a link to one elsewhere."""
    return python.absolute().parent / name


def _end(home: Path) -> None:
    """End what Flower has started in sessions of its own, outside of our children's groups: known by its FLWR_HOME."""
    mark = f"FLWR_HOME={home}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        # A process may end between two looks at it, and those of others are not ours to read.
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
