"""Compare finished runs from their folders: `python -m bench.compare RUN RUN ... --out FILE.json`.

The first run is the baseline. Prints a table (held-out loss before and after, gap to the baseline, round time, what it
consisted of, bytes) on stderr and one JSON object on stdout; the plot beside the file shows training loss by round and
by time. It measures nothing itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench import results
from parablock.run_folder import RunFolder, RunFolderError

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]


def summary(name: str, mode: str, rows: Sequence[Row], baseline_loss: float | None = None) -> Row:
    """One run in numbers; means over rounds, in seconds. Raises ValueError for a run without two evaluations."""
    rounds = [row for row in rows if row["kind"] == "round"]
    losses = [row["eval_loss"] for row in rows if row["kind"] == "evaluation"]
    if not rounds or len(losses) < 2:
        raise ValueError(
            f"{name} has no rounds or fewer than two evaluations; compare finished runs with data.eval set"
        )
    gap = None if baseline_loss is None else 100 * (losses[-1] / baseline_loss - 1)
    means = {
        key: statistics.fmean(row[key] for row in rounds) for key in ("round_s", "compute_s", "comm_s", "exposed_s")
    }
    return {
        "run": name,
        "mode": mode,
        "rounds": len(rounds),
        "eval_loss_before": losses[0],
        "eval_loss_after": losses[-1],
        "gap_pct": gap,
        **means,
        "bytes": sum(row["bytes_up"] + row["bytes_down"] for row in rounds),
        "loss_by_round": [row["loss"] for row in rounds],
        "time_by_round_s": [row["time_s"] for row in rounds],
    }


def table(summaries: Sequence[Row]) -> Table:
    shown = Table(title="runs")
    columns = {
        "run": "{}", "mode": "{}", "rounds": "{}", "eval_loss_before": "{:.4f}", "eval_loss_after": "{:.4f}",
        "gap_pct": "{:+.2f}", "round_s": "{:.2f}", "compute_s": "{:.2f}", "comm_s": "{:.2f}", "exposed_s": "{:.2f}",
        "bytes": "{:,}",
    }  # fmt: skip
    for heading in columns:
        shown.add_column(heading, justify="left" if heading in ("run", "mode") else "right")
    for row in summaries:
        shown.add_row(*("" if row[key] is None else form.format(row[key]) for key, form in columns.items()))
    return shown


def plot(summaries: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    for row in summaries:
        label = f"{row['run']} ({row['eval_loss_after']:.3f} held out)"
        by_round.plot(range(1, row["rounds"] + 1), row["loss_by_round"], label=label)
        by_time.plot(row["time_by_round_s"], row["loss_by_round"], label=label)
    by_round.set(xlabel="rounds done", ylabel="training loss (nats per token)")
    by_time.set(xlabel="time since the start (s)")
    by_round.xaxis.get_major_locator().set_params(integer=True)
    by_round.legend()
    for axes in (by_round, by_time):
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, the baseline first"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the result here, a plot beside it")
    options = parser.parse_args(argv)
    summaries: list[Row] = []
    try:
        results.check_out(options.out)
        for path in options.runs:
            with RunFolder.open(path) as folder:
                baseline = summaries[0]["eval_loss_after"] if summaries else None
                summaries.append(summary(path.name, folder.config().mode, folder.read_metrics(), baseline))
    except (RunFolderError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    Console(stderr=True, width=None if sys.stderr.isatty() else 140).print(table(summaries))
    results.emit({"runs": summaries, "machine": results.machine()}, plot(summaries), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
