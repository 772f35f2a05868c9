"""What an exchange costs in memory: a real worker against its solver alone, and the real broker against its bound.

    python -m bench.memory --quick --out memory.json
    python -m bench.memory --block-mb 4,16,64 --clients 1,2

A model of equal blocks is trained over loopback with one round in flight, by a broker and workers as a user starts
them; and the same rounds by `bench.solver_alone`, as the same kind of process without a broker. Compared are the
largest resident memories of whole lives, imports and loading included. A worker may need three blocks more than its
solver: the block on its way up as it began and what was added to it, and the one that comes down. The broker may need
the model, a block for each client, and three more, beyond what a process has that has imported the same and loaded
next to nothing.

The allocator decides what freed memory can serve again, and differently in each run: by a block or two of 16 MB. Hence
repetitions, medians, and every repetition's figure in the result.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, figures, grid, metered, results, runs, workload
from bench.network import loopback
from bench.processes import Children
from parablock import config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.grid import Grid
    from bench.workload import Workload

WORKER_BAR_BLOCKS = 3
BROKER_BAR_BLOCKS = 3
"""Beyond the solver's memory; beyond the model and a block for each client."""

LAYERS = 4
VOCABULARY = 259  # the tokenizer's: what is not a block should be small
STEPS = 2

DEFAULTS = grid.Defaults(block_mb=("4,16,64", "16"), clients=("1,2", "1"), rounds=(8, 4), repeat=(5, 1))

# What a broker has in memory before it has a model: its imports, also those that loading a model brings.
_BROKER_WITHOUT_A_MODEL = """
from broker import server
from broker.__main__ import load_base, tune
from parablock import config
tune()
load_base(config.Config())
"""

_PATIENCE_S = 300.0

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    grid: Grid
    out: Path | None
    where: Path | None


@dataclass(frozen=True)
class Peaks:
    """Largest resident memories, in bytes. worker: the largest of the workers'. idle_broker: see the module."""

    solver: int
    worker: int
    broker: int
    idle_broker: int


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept."""
    idle = alone(folder, [sys.executable, "-c", _BROKER_WITHOUT_A_MODEL])
    rows = [_row(plan, clients, block_mb, idle, folder) for clients, block_mb in plan.grid.rows()]
    _console.print(table(rows))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _row(plan: Plan, clients: int, block_mb: float, idle: int, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = workload.make(Path(place), hidden=hidden(block_mb), layers=LAYERS, vocabulary=VOCABULARY)
        found = []
        for turn in range(plan.grid.repeat):
            what = f"{clients} client{'s' * (clients != 1)}, blocks of {made.block_bytes / 1e6:.1f} MB"
            _console.print(f"{what}: {turn + 1} of {plan.grid.repeat}")
            found.append(row(clients, made, peaks(made, clients, plan.grid.rounds, idle, Path(place))))
    return {**figures.medians(found), "extra_blocks_by_repeat": [each["extra_blocks"] for each in found]}


def hidden(block_mb: float) -> int:
    """The width at which a decoder layer of `bench.workload` has about so many MB: 13 squares of it in float32.

    A multiple of 8, for four heads of an even size.
    """
    return max(8, 8 * round(math.sqrt(block_mb * 1e6 / (4 * 13)) / 8))


def peaks(made: Workload, clients: int, rounds: int, idle: int, folder: Path) -> Peaks:
    """One run, and its solver alone. Raises ChildError."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        reports = [Path(place) / f"{name}.json" for name in ("broker", *(f"worker-{n}" for n in range(clients)))]
        broker, *workers = map(metered.prefix, reports)
        links = dataclasses.replace(loopback(clients), broker_prefix=broker, client_prefixes=tuple(workers))
        settings = workload.settings(made, "parablock", rounds, clients, STEPS, links.bind)
        runs.run(settings, links, Path(place) / "run")
        asked = Path(place) / "config.toml"
        asked.write_text(config.to_toml(settings), encoding="utf-8")
        solver = alone(Path(place), [sys.executable, "-m", "bench.solver_alone", str(asked)])
        return Peaks(solver, max(map(metered.read, reports[1:])), metered.read(reports[0]), idle)


def alone(folder: Path, command: Sequence[str]) -> int:
    """The peak of a command that needs nobody else. Raises ChildError."""
    with Children(folder) as children:
        started = children.start("alone", [*metered.prefix(folder / "alone.json"), *command], runs.ENVIRONMENT)
        children.wait(started, started.process.poll, _PATIENCE_S)
    return metered.read(folder / "alone.json")


def row(clients: int, made: Workload, found: Peaks) -> dict[str, Any]:
    """One row of the result; MB are 1e6 bytes."""
    block_mb, model_mb = made.block_bytes / 1e6, made.model_bytes / 1e6
    return {
        "workers": clients,
        "block_mb": block_mb,
        "model_mb": model_mb,
        "solver_peak_mb": found.solver / 1e6,
        "worker_peak_mb": found.worker / 1e6,
        "worker_bound_mb": found.solver / 1e6 + WORKER_BAR_BLOCKS * block_mb,
        "extra_blocks": (found.worker - found.solver) / made.block_bytes,
        "bar_blocks": WORKER_BAR_BLOCKS,
        "broker_peak_mb": (found.broker - found.idle_broker) / 1e6,
        "broker_bound_mb": model_mb + (clients + BROKER_BAR_BLOCKS) * block_mb,
        "broker_idle_mb": found.idle_broker / 1e6,
    }


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object: the row whose workers need most blocks beyond their solvers, all rows, the conditions."""
    worst = max(rows, key=lambda row: row["extra_blocks"])
    return {
        "bench": "memory",
        **results.headline(worst),
        "rows": rows,
        "blocks": LAYERS,
        "steps": STEPS,
        "rounds": plan.grid.rounds,
        **results.conditions(plan.grid.repeat, plan.where),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "clients": lambda row: str(row["workers"]),
        " block MB": lambda row: f"{row['block_mb']:.1f}",
        " solver MB": lambda row: f"{row['solver_peak_mb']:.0f}",
        " worker MB": lambda row: f"{row['worker_peak_mb']:.0f}",
        " bound": lambda row: f"{row['worker_bound_mb']:.0f}",
        " blocks more": lambda row: f"{row['extra_blocks']:.2f}",
        " broker MB": lambda row: f"{row['broker_peak_mb']:.0f}",
        " bound ": lambda row: f"{row['broker_bound_mb']:.0f}",
    }
    caption = f"largest resident memory, medians; a worker may need {WORKER_BAR_BLOCKS} blocks more than its solver"
    return results.table(columns, rows, caption)


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """How many blocks a worker needs beyond its solver, and the broker's memory as a share of its bound."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    worker, broker = figure.subplots(1, 2)
    places = range(len(rows))
    for axes, values, bar, name in (
        (worker, [row["extra_blocks"] for row in rows], WORKER_BAR_BLOCKS, "worker beyond its solver (blocks)"),
        (broker, [row["broker_peak_mb"] / row["broker_bound_mb"] for row in rows], 1, "broker over its bound"),
    ):
        axes.bar_label(axes.bar(list(places), values, 0.6, color="tab:blue"), fmt="%.2f", fontsize=8)
        axes.axhline(bar, color="tab:red", linestyle="--", linewidth=1)
        axes.set_xticks(list(places), [f"{row['workers']} ×\n{row['block_mb']:.0f} MB" for row in rows], fontsize=8)
        axes.set_ylabel(name)
        axes.margins(y=0.15)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("memory", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("memory", __doc__, quick="blocks of 16 MB, one client, few rounds")
    DEFAULTS.add_options(parser)
    shm = "keep the runs in /dev/shm; a model's file is in memory there besides"
    parser.add_argument("--shm", action="store_true", help=shm)
    return parser


def _plan(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    if sys.platform != "linux":
        raise ValueError(f"the largest resident memory is taken as Linux tells it; this is {sys.platform}")
    return Plan(DEFAULTS.grid(options), options.out, where)


if __name__ == "__main__":
    sys.exit(main())
