"""Whether a run grows: memory, open files, threads and tasks of broker and light clients over many rounds.

    python -m bench.soak --quick --out soak.json
    python -m bench.soak --rounds 3000

Real broker and real links, a process each, without a model; each writes down what it holds after every round. What is
there once the warm-up is over shall be all there ever is. Files, threads and tasks are counted and must not rise by
one. The slope of memory over the later rounds is told with its noise, and held against a bar below which not even one
small object is kept of each message. It is not zero at first: CPython keeps up to 2,000 freed tuples of each length
for the next one, and a tuple that was made longer than it stayed fills those lists by one, which ends after some 500
rounds; and the broker's SQLite keeps up to 2 MB of the journal's pages (`--rounds 5000 --warm-up 4000` shows the rest).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, exchange, results
from bench.exchange import Exchange
from bench.figures import FiguresError
from parablock.units import parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

BAR_BYTES = 4096.0
"""Resident memory a round may add. A client and a round take a dozen messages, of which the smallest object that Python
could keep has some 50 bytes: with 8 clients a leak of one per message is 5 kB, and one of a chunk is far more."""

COUNTS = ("files", "threads", "tasks")

_SEGMENTS = 10
_T = 2.306  # Student's t at 0.975 for their 8 degrees of freedom

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. warm_up: rounds after which nothing shall grow."""

    clients: int
    blocks: int
    block_bytes: int
    rounds: int
    warm_up: int
    out: Path | None
    where: Path | None


@dataclass(frozen=True)
class Slope:
    """Of a straight line through the means of ten equal parts; per round. error: half its 95 % interval."""

    mean: float
    error: float


def slope(rounds: Sequence[int], values: Sequence[float]) -> Slope:
    """Least squares over at least `_SEGMENTS` rounds. Means of parts, because neighbours are not independent."""
    edges = [len(rounds) * part // _SEGMENTS for part in range(_SEGMENTS + 1)]
    parts = [slice(*ends) for ends in pairwise(edges)]
    x = [statistics.fmean(rounds[part]) for part in parts]
    y = [statistics.fmean(values[part]) for part in parts]
    fit = statistics.linear_regression(x, y)
    rest = sum((there - fit.intercept - fit.slope * here) ** 2 for here, there in zip(x, y, strict=True))
    spread = sum((here - statistics.fmean(x)) ** 2 for here in x)
    return Slope(fit.slope, _T * math.sqrt(rest / (_SEGMENTS - 2) / spread))


def row(process: str, watched: Sequence[Mapping[str, int]], warm_up: int) -> dict[str, Any]:
    """What became of one process. watched: rows of `bench.usage.Watch`, in order.

    grows: what did, of "resident" (its slope is above the bar, by more than its noise) and `COUNTS` (more of them at
    some later time than ever before the warm-up's end). Raises FiguresError where there are too few rows.
    """
    early = [each for each in watched if each["round"] < warm_up]
    late = [each for each in watched if each["round"] >= warm_up]
    if not early or len(late) < _SEGMENTS:
        raise FiguresError(f"{process} was looked at {len(early)} times before round {warm_up} and {len(late)} later")
    rounds = [each["round"] for each in late]
    resident = slope(rounds, [each["resident_bytes"] for each in late])
    objects = slope(rounds, [each["objects"] for each in late])
    found: dict[str, Any] = {
        "process": process,
        "rounds": len(watched),
        "resident_at_mb": late[0]["resident_bytes"] / 1e6,
        "resident_max_mb": max(each["resident_bytes"] for each in late) / 1e6,
        "resident_bytes_per_round": resident.mean,
        "resident_error": resident.error,
        "objects_per_round": objects.mean,
        "objects_error": objects.error,
    }
    grows = ["resident"] if resident.mean - resident.error > BAR_BYTES else []
    for key in COUNTS:
        before, after = (max(each[key] for each in rows) for rows in (early, late))
        found |= {f"{key}_at": before, f"{key}_max": after}
        grows += [key] if after > before else []
    return {**found, "grows": grows, "resident_mb": [each["resident_bytes"] / 1e6 for each in watched]}


def measure(plan: Plan, folder: Path) -> None:
    """One run, printed and kept."""
    asked = Exchange(plan.clients, plan.blocks, plan.block_bytes, plan.rounds, processes=plan.clients, watched=True)
    _console.print(f"{plan.clients} clients, {plan.rounds} rounds")
    exchange.run(asked, folder)
    watches = [folder / "broker.watch", *(folder / f"clients-{index}.watch" for index in range(plan.clients))]
    rows = [row(path.stem, read(path), plan.warm_up) for path in watches]
    _console.print(table(rows, plan))
    results.emit(result(rows, plan), plot(rows, plan.warm_up), plan.out)


def read(path: Path) -> list[dict[str, int]]:
    """What a `bench.usage.Watch` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def result(rows: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object: the process whose memory rises fastest, what grew anywhere, all rows, the conditions."""
    worst = max(rows, key=lambda row: row["resident_bytes_per_round"])
    return {
        "bench": "soak",
        **results.headline(worst),
        "grows": sorted({f"{row['process']}: {what}" for row in rows for what in row["grows"]}),
        "bar_bytes_per_round": BAR_BYTES,
        "clients": plan.clients,
        "warm_up": plan.warm_up,
        "rows": list(rows),
        "blocks": plan.blocks,
        "block_bytes": plan.block_bytes,
        **results.conditions(1, plan.where),
    }


def table(rows: Sequence[dict[str, Any]], plan: Plan) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "process": lambda row: row["process"],
        f" MB at {plan.warm_up}": lambda row: f"{row['resident_at_mb']:.1f}",
        " max later": lambda row: f"{row['resident_max_mb']:.1f}",
        " bytes a round": lambda row: f"{row['resident_bytes_per_round']:+.0f} ± {row['resident_error']:.0f}",
        " objects": lambda row: f"{row['objects_per_round']:+.2f} ± {row['objects_error']:.2f}",
        **{f" {key}": lambda row, key=key: f"{row[f'{key}_at']} → {row[f'{key}_max']}" for key in COUNTS},
        " grows": lambda row: ", ".join(row["grows"]) or "no",
    }
    caption = (
        f"slopes: rounds {plan.warm_up} to {plan.rounds - 1}, ± their 95 % interval; memory grows above "
        f"{BAR_BYTES:.0f} bytes a round; counts: the most before and after round {plan.warm_up}"
    )
    return results.table(columns, rows, caption)


def plot(rows: Sequence[dict[str, Any]], warm_up: int) -> Figure:
    """Resident memory by round, the broker's and the clients'."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for each in reversed(rows):
        broker = each["process"] == "broker"
        label = "broker" if broker else "light clients" if each["process"] == "clients-0" else None
        axes.plot(each["resident_mb"], color="tab:blue" if broker else "tab:gray", linewidth=1, label=label)
    axes.axvline(warm_up, color="tab:red", linestyle="--", linewidth=1, label="warm-up ends")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("resident memory, MB")
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("soak", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("soak", __doc__, quick="150 rounds")
    add = parser.add_argument
    add("--clients", type=int, default=8, help="light clients, a process each (default: 8)")
    add("--rounds", type=int, help="rounds of the run (default: 300; quick: 150)")
    add("--warm-up", type=int, default=50, help="rounds after which nothing shall grow (default: 50)")
    add("--block", default="64KiB", help="size of a block (default: 64KiB)")
    add("--blocks", type=int, default=4, help="blocks of the model (default: 4)")
    command.add_shm(parser)
    return parser


def _plan(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    rounds = options.rounds if options.rounds is not None else (150 if options.quick else 300)
    for name, value in (("--clients", options.clients), ("--blocks", options.blocks), ("--warm-up", options.warm_up)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if rounds < options.warm_up + _SEGMENTS:
        raise ValueError(f"--rounds must exceed --warm-up by at least {_SEGMENTS}, got {rounds} and {options.warm_up}")
    if options.quick and (rounds > 300 or options.clients > 8):
        raise ValueError("--quick ends within 60 s; leave it out for more than 300 rounds or 8 clients")
    block_bytes = parse_size(options.block)
    if block_bytes % 4 or not 4 <= block_bytes <= 1 << 30:
        raise ValueError(f"--block is a multiple of 4 bytes up to 1GiB, got {options.block}")
    return Plan(options.clients, options.blocks, block_bytes, rounds, options.warm_up, options.out, where)


if __name__ == "__main__":
    sys.exit(main())
