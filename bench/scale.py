"""Rounds with many light clients on one broker (design §6), and what one slow client costs the others.

    python -m bench.scale --quick --out scale.json
    python -m bench.scale --clients 16,64,256
    python -m bench.scale --slow-one

Small blocks, no compute: what is left is the broker's work for each client and round. Every round must count every
client, or the benchmark fails. With --slow-one, `bench.slow_client` is measured instead.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, exchange, figures, results, slow_client, usage
from bench.exchange import Exchange
from bench.figures import FiguresError
from bench.network import choose
from parablock.units import parse_numbers, parse_rate, parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.exchange import Finished

WARM_UP_ROUNDS = 2

_FILES_PER_CLIENT = 3  # a socket, what wakes it, and one in hand; all may be in one process
_OTHER_FILES = 200

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. rounds: measured ones, after the warm-up. slow: to be measured instead."""

    clients: tuple[int, ...]
    processes: int
    blocks: int
    block_bytes: int
    rounds: int
    repeat: int
    slow: slow_client.Plan | None
    out: Path | None
    where: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept."""
    if plan.slow is not None:
        found = figures.medians([slow_client.measure(plan.slow, folder) for _ in range(plan.repeat)])
        _console.print(slow_client.table(found))
        told = {"bench": "scale", **slow_client.result(found, plan.slow), **_conditions(plan)}
        results.emit(told, slow_client.plot(found), plan.out)
        return
    rows = [_row(plan, clients, folder) for clients in plan.clients]
    _console.print(table(rows))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _row(plan: Plan, clients: int, folder: Path) -> dict[str, Any]:
    _console.print(f"{clients} clients")
    rounds, processes = plan.rounds + WARM_UP_ROUNDS, min(plan.processes, clients)
    asked = Exchange(clients, plan.blocks, plan.block_bytes, rounds, processes=processes)
    found = []
    for _ in range(plan.repeat):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found.append(row(asked, exchange.run(asked, Path(place))))
    return figures.medians(found)


def row(asked: Exchange, finished: Finished) -> dict[str, Any]:
    """One row of the result. Raises FiguresError where a round did not count every client."""
    for round, counted in enumerate(finished.contributors):
        if len(counted) != asked.clients:
            raise FiguresError(
                f"round {round} counted {len(counted)} of {asked.clients} clients; was the machine too busy to answer "
                "within network.timeout_s? Run it again, or with fewer --clients"
            )
    if len(finished.contributors) != asked.rounds:
        raise FiguresError(f"the run has {len(finished.contributors)} of {asked.rounds} rounds; this is a bug")
    periods_s = finished.periods_s(WARM_UP_ROUNDS)
    broker_cpu_s = finished.broker_cpu_s(WARM_UP_ROUNDS)
    return {
        "clients": asked.clients,
        "round_s": statistics.median(periods_s),
        "broker_cpu_s": broker_cpu_s,
        "broker_cpu_ms_per_client": 1e3 * broker_cpu_s / asked.clients,
        "store_s": finished.store_s(WARM_UP_ROUNDS),
        "broker_peak_mb": finished.broker_peak_bytes / 1e6,
        "rounds": len(periods_s),
        "rounds_s": periods_s,
    }


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object of design §6: the row with most clients, its CPU per client over the first row's, all rows."""
    most = max(rows, key=lambda row: row["clients"])
    fewest = min(rows, key=lambda row: row["clients"])
    return {
        "bench": "scale",
        **results.headline(most),
        "cpu_growth": most["broker_cpu_ms_per_client"] / fewest["broker_cpu_ms_per_client"],
        "rows": rows,
        **_conditions(plan),
        "processes": plan.processes,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "clients": lambda row: str(row["clients"]),
        "round s": lambda row: f"{row['round_s']:.3f}",
        "broker CPU s": lambda row: f"{row['broker_cpu_s']:.3f}",
        "ms per client": lambda row: f"{row['broker_cpu_ms_per_client']:.2f}",
        "store s": lambda row: f"{row['store_s']:.3f}",
        "broker MB": lambda row: f"{row['broker_peak_mb']:.1f}",
    }
    return results.table(columns, rows, "round time: median; the broker's CPU: of one round")


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Round time, and the broker's CPU for one client and round, by number of clients."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [row["clients"] for row in rows]
    left.plot(counts, [row["round_s"] for row in rows], marker="o", color="tab:blue", label="round")
    left.plot(counts, [row["broker_cpu_s"] for row in rows], marker="o", color="tab:gray", label="broker's CPU")
    left.set_ylabel("seconds a round")
    left.legend(fontsize=8)
    right.plot(counts, [row["broker_cpu_ms_per_client"] for row in rows], marker="o", color="tab:gray")
    right.set_ylabel("broker's CPU, ms per client and round")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("clients")
        axes.set_ylim(bottom=0)
    return figure


def _conditions(plan: Plan) -> dict[str, Any]:
    return {
        "blocks": plan.blocks,
        "block_bytes": plan.block_bytes,
        **results.conditions(plan.repeat, plan.where),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("scale", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("scale", __doc__, quick="16 and 64 clients (or fewer rounds with the slow one)")
    add = parser.add_argument
    add("--clients", help="numbers of clients, a row for each (default: 16,64,256; quick: 16,64)")
    add("--processes", type=int, default=2, help="processes that the clients share (default: 2)")
    add("--block", help="size of a block, as 64KiB (default: 64KiB; with the slow one what takes the rate 0.4 s)")
    add("--blocks", type=int, default=2, help="blocks of the model (default: 2)")
    add("--rounds", type=int, help="rounds that are measured in each run (default: 20; quick: 8)")
    add("--repeat", type=int, default=1, help="runs of each kind, of which the medians are given (default: 1)")
    add("--slow-one", action="store_true", help="instead: four clients, one at a tenth of the rate of the others")
    add("--rate", default="80mbit", help="rate of the three other links (default: 80mbit)")
    add("--deadline", type=float, default=0.05, metavar="S", help="round.deadline_s with the slow one (default: 0.05)")
    add("--link", choices=("auto", "kernel", "user"), default="auto", help="what shapes the links of the slow one")
    command.add_shm(parser)
    return parser


def _plan(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    quick, rate = options.quick, parse_rate(options.rate)
    clients = parse_numbers(options.clients or ("16,64" if quick else "16,64,256"), int, "--clients")
    rounds = options.rounds if options.rounds is not None else (8 if quick else 20)
    for name, value in (
        ("--processes", options.processes),
        ("--blocks", options.blocks),
        ("--rounds", rounds),
        ("--repeat", options.repeat),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.slow_one and options.clients:
        raise ValueError(f"--slow-one is {slow_client.CLIENTS} clients; leave out --clients")
    if options.slow_one and rounds < 2:
        raise ValueError("--slow-one needs at least 2 --rounds: the last one is not measured")
    if not 0 < options.deadline < 60:
        raise ValueError(f"--deadline is a time above zero and below a minute, in seconds; got {options.deadline:g}")
    if quick and (max(clients) > 64 or options.repeat > 1):
        raise ValueError("--quick ends within 60 s; leave it out for more than 64 clients or for repetitions")
    default = slow_client.block_bytes(rate) if options.slow_one else 64 << 10
    block_bytes = parse_size(options.block) if options.block else default
    if block_bytes % 4 or not 4 <= block_bytes <= 1 << 30:
        raise ValueError(f"--block is a multiple of 4 bytes up to 1GiB, got {options.block or block_bytes}")
    usage.allow_files(_FILES_PER_CLIENT * max(clients) + _OTHER_FILES)
    slow = None
    if options.slow_one:
        kind, reason = choose(options.link, 0.0)
        _console.print(reason)
        slow = slow_client.Plan(rate, kind, options.deadline, options.blocks, block_bytes, rounds)
    return Plan(
        clients=clients,
        processes=options.processes,
        blocks=options.blocks,
        block_bytes=block_bytes,
        rounds=rounds,
        repeat=options.repeat,
        slow=slow,
        out=options.out,
        where=where,
    )


if __name__ == "__main__":
    sys.exit(main())
