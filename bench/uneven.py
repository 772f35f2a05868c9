"""What a client half as fast costs the others: round times with adaptive K and without, as real processes.

    python -m bench.uneven --out uneven.json

Two clients with a compute thread each, behind shaped links over which a block takes as long as K steps of a fast one.
Cases: equal (both fast, adaptive K), uneven (the first braked, adaptive K), fixed (the first braked, K as it is for a
fast one). What the missing steps cost in loss is `bench.staleness --cases slow-one`'s business.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, figures, results, runs, workload
from bench.network import Kind, choose, network
from parablock import config
from parablock.units import format_rate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from bench.workload import Workload
    from parablock.run_folder import RunFolder

CLIENTS = 2
CASES = ("equal", "uneven", "fixed")
WARM_UP_SWEEPS = 2
"""In which adaptive K finds its value."""

_GUESS_S = 0.5

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """steps: K of a fast client. sweeps: over the blocks, measured. brake: how many times slower the slow one is."""

    steps: int
    sweeps: int
    brake: float
    kind: Kind
    out: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All cases, printed and kept."""
    made = workload.make(folder)
    guess = 2 * made.block_bytes / _GUESS_S
    _console.print(f"calibrating at {format_rate(guess)}")
    rounds = figures.rounds_for(1, made.blocks)
    calibration = _run(plan, made, folder / "calibration", guess, rounds, ["mode=fedbcd"], brake=1.0)
    averages = figures.averages(calibration.read_metrics(), blocks=made.blocks, clients=CLIENTS)
    rate = figures.rate_for(1.0, {guess: averages})
    rows = []
    for case in CASES:
        _console.print(f"{case} at {format_rate(rate)}")
        rounds = figures.rounds_for(WARM_UP_SWEEPS + plan.sweeps, made.blocks)
        settings = [] if case == "fixed" else ["solver.adaptive=true"]
        ran = _run(plan, made, folder / case, rate, rounds, settings, 1.0 if case == "equal" else plan.brake)
        rows.append(row(case, ran.read_metrics(), WARM_UP_SWEEPS * made.blocks))
    _console.print(table(rows, plan))
    results.emit(result(rows, plan, rate), plot(rows), plan.out)


def _run(
    plan: Plan, made: Workload, folder: Path, rate: float, rounds: int, more: Sequence[str], brake: float
) -> RunFolder:
    with network(plan.kind, [rate] * CLIENTS) as links:
        settings = workload.settings(made, "parablock", rounds, CLIENTS, plan.steps, links.bind)
        asked = folder.with_suffix(".toml")
        asked.write_text(config.to_toml(settings), encoding="utf-8")
        first = ("bench.braked", str(brake)) if brake > 1.0 else ("workers",)
        clients = [first, *[("workers",)] * (CLIENTS - 1)]
        return runs.run(config.load(asked, more), links, folder, clients=clients)


def row(case: str, metrics: Sequence[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Of the rounds after the warm-up, without the tail. Times are medians in seconds; steps: mean over both clients.

    Raises FiguresError where a round missed a client.
    """
    rounds = [each for each in metrics if each["kind"] == "round"]
    measured = rounds[figures.WARM_UP_ROUNDS + warm_up : len(rounds) - figures.TAIL_ROUNDS]
    for each in measured:
        if len(each["contributors"]) != CLIENTS:
            raise figures.FiguresError(f"round {each['round']} of {case} missed a client; run it again")
    medians = {key: statistics.median(each[key] for each in measured) for key in ("round_s", "compute_s", "comm_s")}
    steps = statistics.fmean(each["steps"] for each in measured)
    return {"case": case, **medians, "steps": steps, "rounds_s": [each["round_s"] for each in rounds]}


def result(rows: Sequence[dict[str, Any]], plan: Plan, rate: float) -> dict[str, Any]:
    """The JSON object. ratio: round times over those with equal clients, by case."""
    round_s = {each["case"]: each["round_s"] for each in rows}
    return {
        "bench": "uneven",
        "ratio": {case: round_s[case] / round_s["equal"] for case in CASES},
        "brake": plan.brake,
        "steps": plan.steps,
        "rate_bytes_s": rate,
        "link": plan.kind,
        "rows": list(rows),
        "machine": results.machine(),
    }


def table(rows: Sequence[dict[str, Any]], plan: Plan) -> Table:
    """The rows for people."""
    equal_s = rows[0]["round_s"]
    columns = {
        "case": lambda row: row["case"],
        " round s": lambda row: f"{row['round_s']:.3f}",
        " / equal": lambda row: f"{row['round_s'] / equal_s:.2f}",
        " C": lambda row: f"{row['compute_s']:.3f}",
        " M": lambda row: f"{row['comm_s']:.3f}",
        " steps": lambda row: f"{row['steps']:.1f}",
    }
    caption = (
        f"medians over rounds; steps: mean of both clients; the slow one takes {plan.brake:g} times as long a step"
    )
    return results.table(columns, rows, caption)


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Round times, a line a case."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for each in rows:
        axes.plot(each["rounds_s"], marker="o", markersize=3, label=each["case"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("round time (s)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("uneven", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("uneven", __doc__, quick="few rounds")
    add = parser.add_argument
    add("--steps", type=int, default=4, help="K of a fast client (default: 4)")
    add("--sweeps", type=int, help="sweeps over all blocks that are measured (default: 5; quick: 1)")
    add("--brake", type=float, default=2.0, help="how many times as long a step takes the slow one (default: 2)")
    add("--link", choices=("auto", "kernel", "user"), default="auto", help="what shapes the links")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    sweeps = options.sweeps if options.sweeps is not None else (1 if options.quick else 5)
    for name, value in (("--steps", options.steps), ("--sweeps", sweeps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.brake < 1:
        raise ValueError(f"--brake must be at least 1, got {options.brake:g}")
    kind, reason = choose(options.link, 0.0)
    _console.print(reason)
    return Plan(options.steps, sweeps, options.brake, kind, options.out)


if __name__ == "__main__":
    sys.exit(main())
