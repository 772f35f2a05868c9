"""The same exchange through Flower: same payload, same clients, same machine, no training on either side (design §6).

    python -m bench.peers --quick --flower-python flower/bin/python --out peers.json

Each moves one float32 array of a block's size down to and up from every client, as a process each, and forms the
mean; both without encryption. Parablock's round is from the first client's start of upload to the last one's holding
of the block, Flower's from the strategy's first step to the mean. The two take turns.
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

from bench import command, exchange, figures, flower, grid, results
from bench.exchange import Exchange

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.grid import Grid

WARM_UP_ROUNDS = 2
FLOWER_WARM_UP_ROUNDS = 1
"""Its first round starts processes and installs the app."""

DEFAULTS = grid.Defaults(block_mb=("64", "16"), clients=("2", "2"), rounds=(5, 1), repeat=(1, 1))

_BLOCKS = 2

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. flower: the version that `python` has."""

    grid: Grid
    python: Path
    flower: str
    out: Path | None
    where: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept."""
    rows = [_row(plan, clients, block_mb, folder) for clients, block_mb in plan.grid.rows()]
    _console.print(table(rows))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _row(plan: Plan, clients: int, block_mb: float, folder: Path) -> dict[str, Any]:
    asked = Exchange(
        clients, _BLOCKS, grid.block_bytes(block_mb), plan.grid.rounds + WARM_UP_ROUNDS, gated=True, plain=True
    )
    found = []
    for _ in range(plan.grid.repeat):
        _console.print(f"{clients} clients, {block_mb:g} MB: parablock")
        with tempfile.TemporaryDirectory(dir=folder) as place:
            ours = exchange.run(asked, Path(place)).exchange_s(WARM_UP_ROUNDS)
        _console.print(f"{clients} clients, {block_mb:g} MB: Flower {plan.flower}")
        rounds = plan.grid.rounds + FLOWER_WARM_UP_ROUNDS
        theirs = flower.measure(plan.python, clients, asked.block_bytes, rounds, FLOWER_WARM_UP_ROUNDS, folder)
        found.append(row(clients, asked.block_bytes, ours, theirs))
    return figures.medians(found)


def row(clients: int, nbytes: int, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """One row of the result, from the seconds of each round; MB are 1e6 bytes, rates medians."""
    moved_mb = 2 * clients * nbytes / 1e6
    parablock_s, flower_s = statistics.median(ours), statistics.median(theirs)
    return {
        "workers": clients,
        "block_mb": nbytes / 1e6,
        "parablock_mb_s": moved_mb / parablock_s,
        "flower_mb_s": moved_mb / flower_s,
        "ratio": flower_s / parablock_s,
        "parablock_s": parablock_s,
        "flower_s": flower_s,
        "rounds": len(theirs),
        "parablock_rounds_s": list(ours),
        "flower_rounds_s": list(theirs),
    }


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object of design §6: the row with the lowest ratio, all rows, the conditions."""
    worst = min(rows, key=lambda row: row["ratio"])
    return {
        "bench": "peers",
        **results.headline(worst),
        "rows": rows,
        "flower": plan.flower,
        "encryption": "none on either side",
        **results.conditions(plan.grid.repeat, plan.where),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "clients": lambda row: str(row["workers"]),
        "block MB": lambda row: f"{row['block_mb']:g}",
        "parablock MB/s": lambda row: f"{row['parablock_mb_s']:.0f}",
        "Flower MB/s": lambda row: f"{row['flower_mb_s']:.1f}",
        "ratio": lambda row: f"{row['ratio']:.1f}",
        "parablock s": lambda row: f"{row['parablock_s']:.3f}",
        "Flower s": lambda row: f"{row['flower_s']:.2f}",
    }
    return results.table(columns, rows, "payload up + down over all clients; medians over rounds")


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Both rates, on a logarithmic axis, a pair of bars a row."""
    figure = Figure(figsize=(1.6 * len(rows) + 3, 3.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for shift, key, colour, label in (
        (-0.2, "flower_mb_s", "tab:gray", "Flower"),
        (0.2, "parablock_mb_s", "tab:blue", "parablock"),
    ):
        bars = axes.bar([place + shift for place in places], [row[key] for row in rows], 0.4, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_yscale("log")
    axes.set_xticks(list(places), [f"{row['workers']} clients\n{row['block_mb']:g} MB" for row in rows])
    axes.set_ylabel("payload up + down (MB/s)")
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`, 2 also where Flower is missing."""
    return command.run("peers", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("peers", __doc__, quick="blocks of 16 MB, two clients, one round")
    add = parser.add_argument
    add("--flower-python", type=Path, default=Path(sys.executable), help="a Python that has flwr (default: this one)")
    DEFAULTS.add_options(parser)
    command.add_shm(parser)
    return parser


def _plan(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    asked = DEFAULTS.grid(options)
    return Plan(asked, options.flower_python, flower.version(options.flower_python), options.out, where)


if __name__ == "__main__":
    sys.exit(main())
