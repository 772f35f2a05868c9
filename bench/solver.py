"""What a step costs, in time and memory, by ways to fine-tune: the block solver against what users would pick instead.

    python -m bench.solver --quick --methods blocks,bare,adamw
    pip install -c constraints.txt -e '.[rivals]' && python -m bench.solver --out solver.json

Twelve equal layers, a block each, all trained with the same batches, loss and K by each of the ways in
`bench.fine_tuning`: the block solver, a bare loop over the same blocks, AdamW on every parameter, LoRA (peft), and
BAdam. Each in a process of its own with one thread; the ways take turns, so that a machine that changes its pace
favours none. Step times are whole sweeps over their steps, and compared within a turn. Memory is the peak of training,
above what the process had before it loaded the model: the model is in it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, fine_tuning, results, workload
from bench.processes import Children, size
from bench.runs import ENVIRONMENT
from parablock import config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

    from bench.workload import Workload

LAYERS, HIDDEN, VOCABULARY = 12, 384, 259
STEPS = 4

BARS: dict[tuple[str, str], float] = {
    ("step_ratio", "bare"): 1.02,
    ("step_ratio", "badam"): 1.0,
    ("peak_ratio", "badam"): 1.0,
    ("peak_ratio", "adamw"): 0.5,
}
"""What the block solver may need at most of what another way needs (issue 4)."""

_PATIENCE_S = 120.0

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. turns: of each method, a timed sweep each."""

    methods: tuple[str, ...]
    dtype: Literal["float32", "bfloat16"]
    turns: int
    layers: int
    hidden: int
    steps: int
    out: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept."""
    made = workload.make(folder, hidden=plan.hidden, layers=plan.layers, vocabulary=VOCABULARY)
    asked = folder / "config.toml"
    asked.write_text(config.to_toml(settings(made, plan)), encoding="utf-8")
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.methods}
    for turn in range(plan.turns):
        first = turn % len(plan.methods)
        for name in (*plan.methods[first:], *plan.methods[:first]):
            _console.print(f"turn {turn + 1} of {plan.turns}: {name}")
            reports[name].append(_run(name, asked, folder))
    found = rows(reports, steps=plan.steps * plan.layers)
    _console.print(table(found))
    results.emit(result(found, plan, made), plot(found), plan.out)


def settings(made: Workload, plan: Plan) -> config.Config:
    run = workload.settings(made, "fedbcd", 1, 1, plan.steps, "tcp://127.0.0.1:*")
    solver = dataclasses.replace(run.solver, batch_size=1)  # so that parameters, not activations, are the memory
    return dataclasses.replace(run, dtype=plan.dtype, solver=solver)


def _run(name: str, asked: Path, folder: Path) -> dict[str, Any]:
    """What one process measured. Raises ChildError."""
    report = folder / "report.json"
    options = (name, str(asked), "--report", str(report))
    with Children(folder) as children:
        child = children.start(name, [sys.executable, "-m", "bench.fine_tuning", *options], ENVIRONMENT)
        children.wait(child, lambda: size(child.log), _PATIENCE_S)
    measured: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return measured


def rows(reports: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """A row for each method: medians over turns. reports: by method and turn. steps: of a sweep.

    The ratios are the block solver's step time and peak over the method's: medians of each turn's ratio.
    """
    step_s = {name: [each["sweep_s"] / steps for each in own] for name, own in reports.items()}
    peaks = {name: [each["peak_bytes"] for each in own] for name, own in reports.items()}
    return [
        {
            "method": name,
            "step_ms": 1e3 * statistics.median(step_s[name]),
            "peak_mb": statistics.median(peaks[name]) / 1e6,
            "step_ratio": _ratio(step_s["blocks"], step_s[name]),
            "peak_ratio": _ratio(peaks["blocks"], peaks[name]),
            "step_ms_by_turn": [1e3 * each for each in step_s[name]],
            "peak_mb_by_turn": [each / 1e6 for each in peaks[name]],
        }
        for name in reports
    ]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def result(rows: list[dict[str, Any]], plan: Plan, made: Workload) -> dict[str, Any]:
    """The JSON object of design §6: step_ms and peak_mb by method, all rows, the conditions."""
    return {
        "bench": "solver",
        "step_ms": {row["method"]: row["step_ms"] for row in rows},
        "peak_mb": {row["method"]: row["peak_mb"] for row in rows},
        "rows": rows,
        "dtype": plan.dtype,
        "layers": plan.layers,
        "hidden": plan.hidden,
        "block_bytes": made.block_bytes,
        "model_bytes": made.model_bytes,
        "steps": plan.steps,
        "batch": [1, workload.ROW_TOKENS],
        "turns": plan.turns,
        "machine": results.machine(),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "step ms": lambda row: f"{row['step_ms']:.1f}",
        "blocks / it": lambda row: _held(row, "step_ratio"),
        "peak MB": lambda row: f"{row['peak_mb']:.0f}",
        " blocks / it": lambda row: _held(row, "peak_ratio"),
    }
    caption = (
        "blocks / it: the block solver's over the method's, with the bar where there is one; medians over turns, "
        "ratios within a turn; MB = 1e6 bytes"
    )
    return results.table(columns, rows, caption)


def _held(row: Mapping[str, Any], key: str) -> str:
    bar = BARS.get((key, row["method"]))
    return f"{row[key]:.3f}" + (f" ({'within' if row[key] <= bar else 'above'} {bar:g})" if bar is not None else "")


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """A bar for each method: step time, and peak memory."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    names = [row["method"] for row in rows]
    colors = ["tab:blue" if name == "blocks" else "tab:gray" for name in names]
    for axes, key, quantity in zip(
        figure.subplots(1, 2), ("step_ms", "peak_mb"), ("step (ms)", "peak memory (MB)"), strict=True
    ):
        drawn = axes.bar(names, [row[key] for row in rows], color=colors)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
        axes.set_ylabel(quantity)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("solver", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("solver", __doc__, quick="one turn of three layers")
    add = parser.add_argument
    add("--methods", default=",".join(fine_tuning.METHODS), help="of %(default)s; blocks is always run")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model (default: float32)")
    add("--turns", type=int, help="of each method (default: 5; quick: 1)")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    quick = options.quick
    names = options.methods.split(",")
    unknown = [name for name in names if name not in fine_tuning.METHODS]
    if unknown:
        raise ValueError(f"--methods takes {', '.join(fine_tuning.METHODS)}, separated by commas; got {unknown[0]!r}")
    names = list(dict.fromkeys(["blocks", *names]))
    missing = fine_tuning.missing(names)
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} is not installed: pip install -c constraints.txt -e '.[rivals]', "
            "or leave it out with --methods blocks,bare,adamw"
        )
    turns = options.turns if options.turns is not None else (1 if quick else 5)
    if turns < 1:
        raise ValueError(f"--turns must be at least 1, got {turns}")
    return Plan(
        methods=tuple(names),
        dtype=options.dtype,
        turns=turns,
        layers=3 if quick else LAYERS,
        hidden=128 if quick else HIDDEN,
        steps=2 if quick else STEPS,
        out=options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
