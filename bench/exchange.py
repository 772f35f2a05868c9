"""One run that only exchanges: the real broker and light clients as processes, and what each round of it took.

The benchmarks of throughput and scale differ in how many clients they start, in what is between broker and clients,
and in which of these times they look at.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import synthetic
from bench.figures import FiguresError
from bench.gate import Gate
from bench.keyring import Keyring
from bench.processes import Children, size
from parablock import config
from parablock.run_folder import ENDPOINT, METRICS, RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.network import Network

PATIENCE_S = 120.0
"""A run in which no round ends for this long has failed; starting up is within it."""

_LEAVING_S = 60.0

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Exchange:
    """What to run. links: None for plain loopback, else one client a link."""

    clients: int
    blocks: int
    block_bytes: int
    rounds: int
    quorum: int = 0
    deadline_s: float = 0.0
    pause_s: float = 0.0
    """A client's rest before it contributes, in place of training."""
    discards: bool = False
    """Whether the broker keeps no blocks: then an exchange is N uploads, the fold, and N downloads, and no disk."""
    gated: bool = False
    """Whether no client begins a round before all have ended the one before it, so that rounds are timed apart."""
    processes: int = 0
    """Processes that the clients share evenly; 0: one each."""
    watched: bool = False
    """Whether each process writes down what it holds after each round, to FOLDER/NAME.watch, and keeps no times."""
    plain: bool = False
    """Whether nothing is encrypted."""
    secure: bool = False
    """Whether contributions are masked."""
    guests: tuple[str, ...] = ()
    """Further names on the broker's list, whose keys lie with the others."""
    excused: int = 0
    """The last so many processes need not come to the end of the run: a client that fell behind may be left there."""


@dataclass(frozen=True)
class Client:
    """One client's times, by round, on the clock that all processes of a machine share."""

    name: str
    began: dict[int, float]
    """When it began to upload."""
    held: dict[int, float]
    """When it held the committed block."""


@dataclass(frozen=True)
class Finished:
    """What a run gave. `stored` are the broker's rows: round, began, ended, and its CPU seconds by then."""

    clients: tuple[Client, ...]
    contributors: tuple[tuple[str, ...], ...]
    """Names, by round."""
    stored: tuple[dict[str, float], ...]
    broker_peak_bytes: int
    client_peak_bytes: int
    """Of the largest process of clients."""

    def exchange_s(self, warm_up: int) -> list[float]:
        """From the first client's start of upload to the last client's holding of the block, round by round."""
        return exchange_s(self.clients, warm_up)

    def periods_s(self, warm_up: int) -> list[float]:
        """From the last client's holding of one round's block to that of the next."""
        ends = _ends(self.clients)
        return [ends[round] - ends[round - 1] for round in sorted(ends) if round >= max(warm_up, 1)]

    def store_s(self, warm_up: int) -> float:
        """Median of what the broker needed to write a round's block to disk."""
        return statistics.median(row["ended"] - row["began"] for row in self.stored if row["round"] >= warm_up)

    def broker_cpu_s(self, warm_up: int) -> float:
        """The broker's CPU seconds a round, mean over the rounds from `warm_up` (at least 1) on."""
        first, last = self.stored[warm_up - 1], self.stored[-1]
        return (last["cpu_s"] - first["cpu_s"]) / (last["round"] - first["round"])


def exchange_s(clients: Sequence[Client], warm_up: int) -> list[float]:
    """See `Finished.exchange_s`. Raises FiguresError where a round began before the one before it had ended."""
    ends = _ends(clients)
    found = []
    for round in sorted(ends):
        if round < warm_up:
            continue
        began = min(client.began[round] for client in clients if round in client.began)
        if began < ends.get(round - 1, began):
            raise FiguresError(f"round {round} began before round {round - 1} had ended, so that neither can be timed")
        found.append(ends[round] - began)
    return found


def read_clients(report: dict[str, Any]) -> list[Client]:
    """The clients in the report of a process of them."""
    return [Client(each["name"], _by_round(each["began"]), _by_round(each["held"])) for each in report["clients"]]


def run(exchange: Exchange, folder: Path, links: Network | None = None) -> Finished:
    """Start everything, wait for its end, and check that all clients hold the same blocks.

    folder: exists and is empty; the run, its logs and its reports go there. Raises ChildError, with the ends of the
    logs, where a process fails or nothing moves, and FiguresError where blocks differ.
    """
    bind = links.bind if links is not None else "tcp://127.0.0.1:*"
    policy = {"quorum": exchange.quorum, "deadline_s": exchange.deadline_s}
    settings = synthetic.settings(exchange.clients, exchange.rounds, bind, secure=exchange.secure, **policy)
    settings_path, out = folder / "config.toml", folder / "run"
    settings_path.write_text(config.to_toml(settings), encoding="utf-8")
    names = [synthetic.client_name(index) for index in range(exchange.clients)]
    ring = Keyring(folder / "keys", [*names, *exchange.guests], plain=exchange.plain)
    python = (sys.executable, "-m")
    model = ("--blocks", str(exchange.blocks), "--block-bytes", str(exchange.block_bytes))

    def watch(name: str) -> tuple[str, ...]:
        return ("--watch", str(folder / f"{name}.watch")) if exchange.watched else ()

    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(Gate(folder / "gate", exchange.clients)) if exchange.gated else None
        children = stack.enter_context(Children(folder))
        prefix = links.broker_prefix if links is not None else ()
        report = ("--report", str(folder / "broker.json"), *(("--discard",) if exchange.discards else ()))
        report += (*ring.light, *watch("broker"))
        command = [*prefix, *python, "bench.light_broker", str(settings_path), "--out", str(out), *model, *report]
        broker = children.start("broker", command, ENVIRONMENT)
        children.until(lambda: endpoint(out) != "", PATIENCE_S)
        processes = exchange.processes or exchange.clients
        reports = []
        for index in range(processes):
            first, end = (exchange.clients * part // processes for part in (index, index + 1))
            place_of = links.endpoints[index] if links is not None else endpoint(out)
            prefix = links.client_prefixes[index] if links is not None else ()
            reports.append(folder / f"clients-{index}.json")
            place = ("--broker", place_of, "--first", str(first), "--count", str(end - first), *ring.light)
            way = ("--pause-s", str(exchange.pause_s), "--report", str(reports[-1]))
            way += ("--gate", gate.endpoint) if gate is not None else ()
            way += watch(f"clients-{index}")
            children.start(f"clients-{index}", [*prefix, *python, "bench.light", *place, *model, *way], ENVIRONMENT)
        children.wait(broker, lambda: size(out / METRICS), PATIENCE_S)
        needed = reports[: processes - exchange.excused]
        children.until(lambda: all(path.exists() for path in needed), _LEAVING_S)
    return _finished(folder, [json.loads(path.read_text(encoding="utf-8")) for path in reports if path.exists()])


def _finished(folder: Path, reports: list[dict[str, Any]]) -> Finished:
    digests = {each["digest"] for report in reports for each in report["clients"]}
    if len(digests) != 1:
        raise FiguresError(f"the clients hold {len(digests)} different models after the run; this is a bug")
    broker = json.loads((folder / "broker.json").read_text(encoding="utf-8"))
    with RunFolder.open(folder / "run") as run_folder:
        rows = [row for row in run_folder.read_metrics() if row["kind"] == "round"]
    return Finished(
        clients=tuple(client for report in reports for client in read_clients(report)),
        contributors=tuple(tuple(row["contributors"]) for row in rows),
        stored=tuple(broker["stored"]),
        broker_peak_bytes=broker["peak_bytes"],
        client_peak_bytes=max(report["peak_bytes"] for report in reports),
    )


def _ends(clients: Sequence[Client]) -> dict[int, float]:
    """By round, when the last client held its block."""
    ends: dict[int, float] = {}
    for client in clients:
        for round, at in client.held.items():
            ends[round] = max(at, ends.get(round, at))
    return ends


def endpoint(out: Path) -> str:
    """Where the broker listens; "" until it has written the whole line."""
    path = out / ENDPOINT
    line = path.read_text(encoding="utf-8") if path.exists() else ""
    return line.strip() if line.endswith("\n") else ""


def _by_round(pairs: list[list[float]]) -> dict[int, float]:
    return {int(round): at for round, at in pairs}
