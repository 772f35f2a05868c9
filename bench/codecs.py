"""What codecs cost in loss, and save in bytes: the quickstart's problem with each, at equal rounds, over many seeds.

    python -m bench.codecs --seeds 0-9 --set solver.lr=1e-3 --set solver.warmup=0 --out codecs.json
    python -m bench.codecs --quick

Each run is a broker and two workers as real processes. Two runs that differ in their last bits end at losses that are
tens of per cent apart, so that a codec is compared with float32 seed by seed: of the final held-out losses, and of the
whole curve of them (mean log ratio over its points, which varies less), the mean over seeds is given with its 95 %
confidence interval (Student's t), and whether that lies within the bar. `float32~`, which differs from float32 in
rounding alone, says what the method takes for a difference where there is none: at the quickstart's own learning rate
as much as for a codec; at a fifth of it next to nothing, so that there small differences can be told. Beside it the
speed of each codec on one thread, in bytes of float32 per second; float32 itself has none, as it only gives views.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from bench import codec_cases, command, learning_curve, paired, results
from bench.codec_cases import CASES, NULL, REFERENCE
from bench.figures import FiguresError
from bench.paired import Paired, log_ratios, percent
from parablock.codec import codec_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.table import Table

    from bench.codec_cases import Case
    from bench.learning_curve import LearningCurve
    from parablock.codec import CodecName

_CHUNK = 1 << 18  # elements

# Without and with --quick.
_SEEDS = ("0-4", "0")
_CODECS = (",".join(CASES), "float32,int4")

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. cases: float32 first. overrides: settings of every run."""

    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    out: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All runs, seed by seed; the result printed and kept."""
    trained: dict[str, list[LearningCurve]] = {case.name: [] for case in plan.cases}
    began, done, runs = time.monotonic(), 0, len(plan.seeds) * len(plan.cases)
    for turn, seed in enumerate(plan.seeds, 1):
        for case in plan.cases:
            found = codec_cases.train(case, seed, plan.overrides, folder / f"{case.name}-{seed}")
            if case.name == NULL:
                check_null(found, trained[REFERENCE][-1])
            trained[case.name].append(found)
            done += 1
            left_s = (time.monotonic() - began) / done * (runs - done)
            gap = log_ratios([found.final_loss], [trained[REFERENCE][-1].final_loss])[0]
            _console.print(
                f"seed {seed} ({turn} of {len(plan.seeds)}), {case.name}: final held-out loss {found.final_loss:.5f} "
                f"({percent(gap):+.1f} %); {left_s / 60:.0f} min left"
            )
    rows = [row(case, trained[case.name], trained[REFERENCE]) for case in plan.cases]
    _console.print(table(rows))
    results.emit(result(rows, plan), plot(rows), plan.out)


def speed(name: CodecName, seconds: float = 0.3) -> tuple[float, float]:
    """(encoding, decoding) of chunks of 1 MiB of float32 on this thread, in MB/s of float32."""
    codec, values = codec_of(name), np.random.default_rng(0).standard_normal(_CHUNK, np.float32) * np.float32(1e-4)
    payload = codec.encode(values)
    found = []
    out = np.empty_like(values)

    def encode() -> None:
        codec.encode(values)

    def decode() -> None:
        out[...] = codec.decode(payload, values.size)

    for act in (encode, decode):
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            act()
            count += 1
        found.append(count * values.nbytes / (time.perf_counter() - began) / 1e6)
    return found[0], found[1]


def row(case: Case, trained: Sequence[LearningCurve], reference: Sequence[LearningCurve]) -> dict[str, Any]:
    """A case against float32, seed by seed. Gaps above zero are worse."""
    bar = math.log1p(case.bar_pct / 100)
    final, curve = compare(trained, reference)
    losses = [each.final_loss for each in trained]
    encode, decode = (None, None) if codec_of(case.codec).lossless else speed(case.codec)
    return {
        "case": case.name,
        "codec": case.codec,
        "error_feedback": case.feedback,
        "final_loss": statistics.geometric_mean(losses),
        "final_losses": losses,
        "final": None if case.name == REFERENCE else final.told(bar),
        "curve": None if case.name == REFERENCE else curve.told(bar),
        "bytes": trained[0].nbytes,
        "bytes_ratio": trained[0].nbytes / reference[0].nbytes,
        "encode_mb_s": encode,
        "decode_mb_s": decode,
        "evaluated": list(trained[0].held_out),
        "loss_by_evaluation": [
            statistics.geometric_mean(each) for each in zip(*(run.held_out.values() for run in trained), strict=True)
        ],
    }


def check_null(found: LearningCurve, reference: LearningCurve) -> None:
    """Raises FiguresError where the null case is float32 itself."""
    if found.held_out == reference.held_out:
        raise FiguresError(
            f"{NULL} gave the losses of float32, bit for bit: torch has only its plain kernels for this processor, so "
            f"that they change no rounding; leave {NULL} out of --codecs"
        )


def compare(trained: Sequence[LearningCurve], reference: Sequence[LearningCurve]) -> tuple[Paired, Paired]:
    """(final losses, whole curves). A curve's log ratio is the mean of those at its points."""
    final = log_ratios([each.final_loss for each in trained], [each.final_loss for each in reference])
    curves = [
        statistics.fmean(log_ratios(list(each.held_out.values()), list(other.held_out.values())))
        for each, other in zip(trained, reference, strict=True)
    ]
    return Paired(tuple(final)), Paired(tuple(curves))


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object."""
    return {
        "bench": "codecs",
        "rows": rows,
        "seeds": list(plan.seeds),
        "overrides": list(plan.overrides),
        "machine": results.machine(),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "case": lambda row: row["case"],
        " bytes": lambda row: f"{row['bytes_ratio']:.3f}",
        " final loss": lambda row: f"{row['final_loss']:.5f}",
        " gap, 95 %": lambda row: paired.text(row["final"]),
        " bar": lambda row: _verdict(row["final"]),
        " curve's gap, 95 %": lambda row: paired.text(row["curve"]),
        " bar ": lambda row: _verdict(row["curve"]),
        " encode": lambda row: _speed(row["encode_mb_s"]),
        " decode": lambda row: _speed(row["decode_mb_s"]),
    }
    seeds = len(rows[0]["final_losses"])
    caption = (
        f"{seeds} seeds; gaps to float32 in per cent, paired by seed; in brackets how many seeds the bar would take; "
        f"case-: without error feedback; {NULL}: rounded otherwise; speed in MB/s"
    )
    return results.table(columns, rows, caption)


def _verdict(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    needed = f" [{told['pairs_needed']}]" if told["verdict"] == "undecided" and told["pairs_needed"] else ""
    return f"{told['bar_pct']:.1f}: {told['verdict']}{needed}"


def _speed(mb_s: float | None) -> str:
    return "–" if mb_s is None else f"{mb_s:.0f}"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Held-out loss by round, and each case's gaps with their intervals."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for each in rows:
        left.plot(each["evaluated"], each["loss_by_evaluation"], label=each["case"], linewidth=1)
    left.set(xlabel="rounds", ylabel="held-out loss (nats per token)", yscale="log")
    left.legend(fontsize=8)
    compared = [each for each in rows if each["final"] is not None]
    for shift, key, colour in ((0.15, "final", "tab:gray"), (-0.15, "curve", "tab:blue")):
        for place, each in enumerate(compared):
            told = each[key]
            ends = [told["low_pct"], told["high_pct"]] if told["low_pct"] is not None else [told["gap_pct"]] * 2
            right.plot(ends, [place + shift] * 2, color=colour, label="" if place else key)
            right.plot([told["gap_pct"]], [place + shift], color=colour, marker="o", markersize=4)
    for place, each in enumerate(compared):
        right.plot([each["final"]["bar_pct"]] * 2, [place - 0.35, place + 0.35], color="tab:red", linewidth=1)
    right.axvline(0, color="black", linewidth=0.5)
    right.set_yticks(range(len(compared)), [each["case"] for each in compared])
    right.set_xlabel("gap to float32 (%), 95 % interval; red: the bar")
    if compared:
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("codecs", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("codecs", __doc__, quick="float32 and int4, one seed, eight rounds")
    add = parser.add_argument
    add("--seeds", help=f"seeds of the runs, as 0,1,2 or 0-19 (default: {_SEEDS[False]})")
    add("--codecs", help=f"of {', '.join(CASES)} (default: all); float32 is always run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run; repeatable")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    quick = options.quick
    if quick and (options.seeds is not None or options.codecs is not None):
        raise ValueError("--quick is one seed of float32 and int4 within 60 s; leave it out for other seeds or codecs")
    seeds = command.seeds(options.seeds if options.seeds is not None else _SEEDS[quick])
    names = (options.codecs if options.codecs is not None else _CODECS[quick]).split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"--codecs takes {', '.join(CASES)}, separated by commas; got {', '.join(unknown)}")
    overrides = (*(["rounds=8"] if quick else []), *options.set)
    learning_curve.settings(None, overrides)  # a typing mistake is told now
    cases = dict.fromkeys([REFERENCE, *names])
    return Plan(tuple(CASES[name] for name in cases), seeds, overrides, options.out)


if __name__ == "__main__":
    sys.exit(main())
