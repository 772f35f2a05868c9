"""One run of parablock as a user would start it: real broker and worker processes, until they end.

`run` starts them one by one over given links; `launch` has `parablock run` do it on this machine, `launch_many` for
several runs side by side.

What is trained and what is made of the metrics is the caller's business.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from bench.keyring import Keyring
from bench.processes import POLL_S, Children, size
from bench.results import cores
from parablock import config
from parablock.run_folder import METRICS, RunFolder

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from bench.network import Network

PATIENCE_S = 120.0
"""A run without a new row of metrics for this long has failed; starting up, torch included, is within it."""

_LEAVING_S = 20.0

ENVIRONMENT = {
    # A client has one compute thread, so that a bench of two clients on two cores measures two clients.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def run(
    settings: config.Config,
    links: Network,
    folder: Path,
    module: Sequence[str] = ("broker",),
    clients: Sequence[Sequence[str]] | None = None,
    *,
    plain: bool = False,
) -> RunFolder:
    """Start a broker and one worker per link, wait until all have ended well, and return the run's folder.

    settings: with `network.bind` as `links` says; worker i has shard i of `data.train` and `data.eval`. folder: new;
    it gets the config, a log per process, and the run in `folder/run`. module: the broker's, and what comes before its
    arguments. clients: the same of each worker; None: `workers`. plain: unencrypted, which goes on this machine only.
    Raises ChildError, with the ends of the logs, where a
    process fails or nothing moves.
    """
    clients = clients or [("workers",)] * len(links.endpoints)
    assert settings.network.bind == links.bind, "the broker must listen where the links lead"
    assert settings.round.clients == len(links.endpoints), "one link per client"
    folder.mkdir()
    config_path, out = folder / "config.toml", folder / "run"
    config_path.write_text(config.to_toml(settings), encoding="utf-8")
    names = [f"worker-{index}" for index in range(len(links.endpoints))]
    ring = Keyring(folder / "keys", names, plain=plain)

    def progress() -> int:
        return size(out / METRICS)

    python = (sys.executable, "-m")
    with Children(folder) as children:
        broker_options = (str(config_path), "--out", str(out), *ring.broker)
        broker = children.start("broker", [*links.broker_prefix, *python, *module, *broker_options], ENVIRONMENT)
        workers = []
        for index, (endpoint, prefix) in enumerate(zip(links.endpoints, links.client_prefixes, strict=True)):
            name = names[index]
            place = (*ring.client(name, endpoint), "--name", name, "--threads", "1")
            shard = f"{index}/{len(links.endpoints)}"
            rows = (f"--data={settings.data.train}", f"--eval={settings.data.eval}", "--shard", shard)
            place = (*place, "--state", str(folder / f"{name}-state"))
            workers.append(children.start(name, [*prefix, *python, *clients[index], *place, *rows], ENVIRONMENT))
        children.wait(broker, progress, PATIENCE_S)
        for worker in workers:
            children.wait(worker, progress, _LEAVING_S)
    return RunFolder.open(out)


def launch(settings: config.Config, folder: Path, environment: Mapping[str, str] | None = None) -> RunFolder:
    """Have `parablock run` start a broker and `round.clients` workers over loopback, and return the run's folder.

    folder: new. environment: added to that of all processes. Raises ChildError as `run` does.
    """
    with contextlib.closing(_launching(settings, folder, (), environment)) as launching:
        while True:
            try:
                next(launching)
            except StopIteration as ended:
                finished: RunFolder = ended.value
                return finished
            time.sleep(POLL_S)


def launch_many(asked: Sequence[tuple[config.Config, Path]], jobs: int) -> Generator[tuple[int, RunFolder], None, None]:
    """As `launch`, up to `jobs` at a time, begun in their order: each with its place in `asked`, as it ends.

    asked: settings and folders. The cores are shared out evenly to all workers of all jobs. Where one run fails, or
    whoever asked wants no more, the others are ended.
    """
    waiting = deque(enumerate(asked))
    running: dict[int, Generator[None, None, RunFolder]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                place, (settings, folder) = waiting.popleft()
                threads = max(1, cores() // (jobs * settings.round.clients))
                running[place] = _launching(settings, folder, ("--threads", str(threads)), None)
            for place, launching in list(running.items()):
                try:
                    next(launching)
                except StopIteration as ended:
                    del running[place]
                    yield place, ended.value
            time.sleep(POLL_S)
    finally:
        for launching in running.values():
            launching.close()


def _launching(
    settings: config.Config, folder: Path, options: Sequence[str], environment: Mapping[str, str] | None
) -> Generator[None, None, RunFolder]:
    """`launch`, a look at each turn. options: of `parablock run`."""
    folder.mkdir()
    config_path, out = folder / "config.toml", folder / "run"
    config_path.write_text(config.to_toml(settings), encoding="utf-8")
    with Children(folder) as children:
        command = [sys.executable, "-m", "parablock.cli", "run", str(config_path), "--out", str(out)]
        command += ["--workers", str(settings.round.clients), *options]
        started = children.start("run", command, environment)
        yield from children.watch(started, lambda: size(out / METRICS), PATIENCE_S)
    return RunFolder.open(out)
