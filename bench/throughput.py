"""A full exchange (N uploads, fold, N downloads) against a bare pyzmq ROUTER/DEALER moving the same bytes (design §6).

    python -m bench.throughput --quick --out throughput.json
    python -m bench.throughput --block-mb 4,16,64,256 --clients 2,4,8 --shm
    python -m bench.throughput --secure

Real processes on loopback: the broker over a synthetic model, light clients, no compute. A round's time is from the
first client's start of upload to the last client's holding of the committed block; bytes are those of the blocks, up
and down, over all clients. Parablock and the bare sockets take turns, so that what else the machine does hits both;
both are encrypted (CURVE), or with --plain neither is. Memory is above what a process had before it made its arrays,
with the libraries loaded that a broker and a worker load when they start; how much of it does not grow with the block,
code that runs for the first time above all, a run with blocks of next to nothing tells. With --secure,
`bench.secure_cost` is measured instead.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, exchange, figures, grid, raw, results, secure_cost
from bench.exchange import Exchange
from bench.network import choose
from parablock.layout import chunk_numel
from parablock.sections import Network
from parablock.units import parse_rate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.exchange import Finished
    from bench.grid import Grid

WARM_UP_ROUNDS = 2
_NEXT_TO_NOTHING = 4096
"""Bytes of a block."""

DEFAULTS = grid.Defaults(block_mb=("4,16,64,256", "16"), clients=("2,4,8", "2"), rounds=(8, 5), repeat=(3, 1))
SECURE = grid.Defaults(block_mb=("4,16", "4"), clients=("8", "8"), rounds=(8, 5), repeat=(5, 1))

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. blocks: of the model. secure: to be measured instead."""

    grid: Grid
    blocks: int
    plain: bool
    secure: secure_cost.Plan | None
    out: Path | None
    where: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept."""
    if plan.secure is not None:
        rows = secure_cost.measure(plan.secure, folder)
        _console.print(secure_cost.table(rows))
        told = secure_cost.result(rows, plan.secure) | results.conditions(plan.grid.repeat, plan.where)
        results.emit(told, secure_cost.plot(rows), plan.out)
        return
    rows = [_row(plan, clients, block_mb, folder) for clients, block_mb in plan.grid.rows()]
    _console.print(table(rows))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _row(plan: Plan, clients: int, block_mb: float, folder: Path) -> dict[str, Any]:
    _console.print(f"{clients} clients, blocks of {block_mb:g} MB")
    nbytes = grid.block_bytes(block_mb)
    asked = Exchange(clients, plan.blocks, nbytes, plan.grid.rounds + WARM_UP_ROUNDS, gated=True, plain=plan.plain)
    found = []
    for _ in range(plan.grid.repeat):
        bare = raw.measure(clients, nbytes, chunk_bytes(nbytes), asked.rounds, WARM_UP_ROUNDS, folder, plain=plan.plain)
        finished = []
        for each in (dataclasses.replace(asked, discards=True), asked):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                finished.append(exchange.run(each, Path(place)))
        found.append(row(asked, *finished, _fixed(asked, folder), bare))
    return figures.medians(found)


def _fixed(asked: Exchange, folder: Path) -> Finished:
    """The same with blocks of next to nothing."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        return exchange.run(dataclasses.replace(asked, block_bytes=_NEXT_TO_NOTHING), Path(place))


def chunk_bytes(nbytes: int) -> int:
    """Of the messages in which a block of `nbytes` travels, on either side."""
    return 4 * chunk_numel(nbytes // 4, Network().chunk_bytes)


def row(asked: Exchange, moved: Finished, stored: Finished, fixed: Finished, raw_s: Sequence[float]) -> dict[str, Any]:
    """One row of the result. moved: the run that kept no blocks; stored: the one that did. fixed: see `_fixed`.

    raw_s: seconds of the bare exchange's rounds; MB are 1e6 bytes, rates medians.
    """
    moved_mb = 2 * asked.clients * asked.block_bytes / 1e6
    block_mb = asked.block_bytes / 1e6
    rounds_s, stored_rounds_s = moved.exchange_s(WARM_UP_ROUNDS), stored.exchange_s(WARM_UP_ROUNDS)
    exchange_s, bare_s = statistics.median(rounds_s), statistics.median(raw_s)
    stored_s = statistics.median(stored_rounds_s)
    return {
        "workers": asked.clients,
        "block_mb": block_mb,
        "chunk_bytes": chunk_bytes(asked.block_bytes),
        "exchange_mb_s": moved_mb / exchange_s,
        "raw_zmq_mb_s": moved_mb / bare_s,
        "ratio": bare_s / exchange_s,
        "exchange_s": exchange_s,
        "stored_mb_s": moved_mb / stored_s,
        "stored_ratio": bare_s / stored_s,
        "store_s": stored.store_s(WARM_UP_ROUNDS),
        "broker_peak_mb": stored.broker_peak_bytes / 1e6,
        "broker_fixed_mb": fixed.broker_peak_bytes / 1e6,
        "bound_mb": block_mb * (asked.blocks + asked.clients + 3),
        "client_peak_mb": stored.client_peak_bytes / 1e6,
        "client_fixed_mb": fixed.client_peak_bytes / 1e6,
        # What a light client has in a solver's place: the model's blocks and the update that it sends.
        "client_bound_mb": block_mb * (asked.blocks + 1 + 3),
        "broker_cpu_s": stored.broker_cpu_s(WARM_UP_ROUNDS),
        "rounds": len(rounds_s),
        "rounds_s": rounds_s,
        "stored_rounds_s": stored_rounds_s,
        "raw_rounds_s": list(raw_s),
    }


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object of design §6: the row with the lowest ratio, all rows, the conditions."""
    worst = min(rows, key=lambda row: row["ratio"])
    return {
        "bench": "throughput",
        **results.headline(worst),
        "rows": rows,
        "blocks": plan.blocks,
        "encryption": "none on either side" if plan.plain else "CURVE on both sides",
        **results.conditions(plan.grid.repeat, plan.where),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "clients": lambda row: str(row["workers"]),
        "block MB": lambda row: f"{row['block_mb']:g}",
        "MB/s": lambda row: f"{row['exchange_mb_s']:.0f}",
        "bare": lambda row: f"{row['raw_zmq_mb_s']:.0f}",
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "round s": lambda row: f"{row['exchange_s']:.3f}",
        "stored": lambda row: f"{row['stored_ratio']:.2f}",
        "store s": lambda row: f"{row['store_s']:.3f}",
        "broker MB": lambda row: f"{row['broker_peak_mb']:.0f}",
        "fixed": lambda row: f"{row['broker_fixed_mb']:.0f}",
        "bound": lambda row: f"{row['bound_mb']:.0f}",
        "client MB": lambda row: f"{row['client_peak_mb']:.0f}",
        "fixed ": lambda row: f"{row['client_fixed_mb']:.0f}",
        "bound ": lambda row: f"{row['client_bound_mb']:.0f}",
    }
    return results.table(
        columns,
        rows,
        "medians; stored: the ratio with every block made durable; memory: peaks, what of them does not grow with the "
        "block, and what they may be",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Rates by block size, parablock against the bare sockets, a panel for each number of clients."""
    counts = sorted({each["workers"] for each in rows})
    figure = Figure(figsize=(3.4 * len(counts) + 1, 3.4), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for axes, count in zip(panels, counts, strict=True):
        chosen = sorted((each for each in rows if each["workers"] == count), key=lambda each: each["block_mb"])
        sizes = [each["block_mb"] for each in chosen]
        for key, colour, label in (
            ("raw_zmq_mb_s", "tab:gray", "bare pyzmq"),
            ("exchange_mb_s", "tab:blue", "parablock"),
        ):
            axes.plot(sizes, [each[key] for each in chosen], color=colour, marker="o", markersize=4, label=label)
        for each in chosen:
            place = (each["block_mb"], each["exchange_mb_s"])
            axes.annotate(f"{each['ratio']:.2f}", place, (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xscale("log", base=4)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_ylim(0, 1.1 * max(max(each["raw_zmq_mb_s"], each["exchange_mb_s"]) for each in rows))
        axes.set_title(f"{count} clients", fontsize=10)
        axes.set_xlabel("block (MB)")
    panels[0].set_ylabel("payload up + down (MB/s)")
    panels[-1].legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("throughput", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("throughput", __doc__, quick="blocks of 16 MB, two clients, few rounds")
    add = parser.add_argument
    DEFAULTS.add_options(parser)
    add("--blocks", type=int, default=2, help="blocks of the model (default: 2)")
    add("--plain", action="store_true", help="encrypt nothing, on either side")
    add("--secure", action="store_true", help="what masks cost an exchange of 8 clients over shaped links, in pairs")
    add("--rate", default="100mbit", help="of each client's link (--secure; default: 100mbit)")
    add("--link", choices=("auto", "kernel", "user"), default="auto", help="made by what (--secure)")
    command.add_shm(parser)
    return parser


def _plan(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    asked = (SECURE if options.secure else DEFAULTS).grid(options)
    if options.blocks < 1:
        raise ValueError(f"--blocks must be at least 1, got {options.blocks}")
    secure = None
    if options.secure:
        secure = secure_cost.Plan(asked, parse_rate(options.rate), choose(options.link, 0.0)[0])
    return Plan(asked, options.blocks, options.plain, secure, options.out, where)


if __name__ == "__main__":
    sys.exit(main())
