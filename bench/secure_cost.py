"""What masks cost an exchange: the same one plain and under masks, in turns, each client over a shaped link of its own.

Keys are exchanged while clients rest, as they are while real ones train. Chunks under masks are a sixteenth of a block
instead of an eighth (`parablock.layout`), which is part of what is compared. Reached as
`python -m bench.throughput --secure`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import exchange, results
from bench.exchange import Exchange
from bench.figures import FiguresError
from bench.network import network
from bench.paired import Paired, log_ratios, text
from parablock.units import format_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from bench.exchange import Finished
    from bench.grid import Grid
    from bench.network import Kind

WARM_UP_ROUNDS = 2
PAUSE_S = 0.5
"""A client's rest before it contributes, in place of training."""
BLOCKS = 2
BAR = math.log(1.15)
"""Of the seconds of an exchange, as a log ratio."""

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """grid: its `repeat` are pairs. rate: bytes per second, of each client's link."""

    grid: Grid
    rate: float
    kind: Kind


def measure(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """A row for each size of a block with each number of clients."""
    return [_row(plan, clients, int(block_mb * 1e6) // 4 * 4, folder) for clients, block_mb in plan.grid.rows()]


def _row(plan: Plan, clients: int, nbytes: int, folder: Path) -> dict[str, Any]:
    _console.print(f"{clients} clients at {format_rate(plan.rate)}, blocks of {nbytes / 1e6:g} MB")
    plain = Exchange(
        clients, BLOCKS, nbytes, plan.grid.rounds + WARM_UP_ROUNDS, gated=True, discards=True, pause_s=PAUSE_S
    )
    pairs = []
    for _ in range(plan.grid.repeat):
        pair = []
        for asked in (plain, dataclasses.replace(plain, secure=True)):
            with network(plan.kind, [plan.rate] * clients) as links, tempfile.TemporaryDirectory(dir=folder) as place:
                pair.append(exchange.run(asked, Path(place), links))
        pairs.append((pair[0], pair[1]))
    return row(plain, pairs)


def row(asked: Exchange, pairs: list[tuple[Finished, Finished]]) -> dict[str, Any]:
    """pairs: plain, and under masks. Raises FiguresError where a round did not count every client."""
    for finished in (each for pair in pairs for each in pair):
        if any(len(counted) != asked.clients for counted in finished.contributors):
            raise FiguresError("a round did not count every client; was the machine too busy? Run it again")
    seconds = [[each.exchange_s(WARM_UP_ROUNDS) for each in pair] for pair in pairs]
    medians = [[statistics.median(each) for each in pair] for pair in seconds]
    plain, masked = zip(*medians, strict=True)
    return {
        "workers": asked.clients,
        "block_mb": asked.block_bytes / 1e6,
        "plain_s": statistics.median(plain),
        "secure_s": statistics.median(masked),
        "overhead": Paired(tuple(log_ratios(masked, plain))).told(BAR),
        "broker_cpu_s": statistics.median(pair[0].broker_cpu_s(WARM_UP_ROUNDS) for pair in pairs),
        "secure_broker_cpu_s": statistics.median(pair[1].broker_cpu_s(WARM_UP_ROUNDS) for pair in pairs),
        "rounds": len(seconds[0][0]),
        "plain_rounds_s": [pair[0] for pair in seconds],
        "secure_rounds_s": [pair[1] for pair in seconds],
    }


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object: the row with the largest overhead, all rows, and what they hold for."""
    worst = max(rows, key=lambda row: row["overhead"]["gap_pct"])
    return {
        "bench": "throughput",
        "case": "secure",
        **results.headline(worst),
        "rows": rows,
        "rate_bytes_s": plan.rate,
        "link": plan.kind,
        "pause_s": PAUSE_S,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "clients": lambda row: str(row["workers"]),
        " block MB": lambda row: f"{row['block_mb']:g}",
        " exchange s": lambda row: f"{row['plain_s']:.3f}",
        " under masks": lambda row: f"{row['secure_s']:.3f}",
        " overhead %": lambda row: text(row["overhead"]),
        " broker CPU s": lambda row: f"{row['broker_cpu_s']:.2f}, {row['secure_broker_cpu_s']:.2f}",
    }
    return results.table(columns, rows, "medians of the rounds of each run; overhead over the pairs")


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Every round of every pair, plain and under masks, a panel a row."""
    figure = Figure(figsize=(3.4 * len(rows) + 1, 3.2), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for key, colour, label in (
            ("plain_rounds_s", "tab:gray", "plain"),
            ("secure_rounds_s", "tab:blue", "under masks"),
        ):
            axes.plot([s for pair in each[key] for s in pair], color=colour, marker="o", markersize=3, label=label)
        axes.set(title=f"{each['workers']} clients, {each['block_mb']:g} MB", xlabel="round", ylabel="exchange (s)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    return figure
