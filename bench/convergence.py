"""How fast each way to train gets how far: held-out loss by round, time and bytes, over seeds.

    python -m bench.convergence --seeds 0-9 --rate 20mbit --out convergence.json
    python -m bench.convergence --cases fedbcd,parablock --rate 4mbit --set rounds=32 --rounds parablock=35
    python -m bench.convergence --quick

The ways are fedbcd (synchronous rounds of blocks), to which all are compared seed by seed, parablock with each of its
corrections (`parablock` is shrink, then `own` and `stale`), and the baselines fedcybgd, fedavg, lora, ffa-lora and
lisa. At equal rounds two of them train less: lisa half as often, since two of its rounds exchange what was trained at
once, and each of the N clients of fedcybgd 1/N as often, since one of them trains in each round. Each run is a broker
and workers as real processes, over loopback or, with --rate, over a shaped link for each client; the ways take turns at
who is first. Gaps are those of the final held-out losses, means over seeds with their 95 % confidence interval
(Student's t on log ratios).

Time is the clock of the runs themselves: from the evaluation before the first round until a round is committed, with
the evaluations between, which are alike for all, but without the processes' start. Loopback has little to hide, so that
times tell parablock from fedbcd only with --rate. On the way, a client of parablock is evaluated with what stands for
the block that is not back yet; the final loss is that of the drained pipeline. The speed-up at equal loss is fedbcd's
time to its final loss over the time that the other needs to get there, by the same seed; the median takes a run that
never got there for slower than any other. Its inverse is the share of fedbcd's time, a geometric mean with its interval
where all runs got there. Rounds are equal unless --rounds gives a case its own, over which its learning rate falls:
what is quicker by the round may then take a few more of them to end as low.

Workers train on a GPU where torch sees one, all of them on the same. With --jobs several runs share the machine: losses
are what they would be but for rounding (workers have fewer threads), times are not.

Learning rates are the settings', unless --lr gives a case its own: the best for adapters is not the best for the whole
model.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console

from bench import command, convergence_cases, paired, results
from bench.convergence_cases import CASES, REFERENCE, TAKEN, Conditions
from bench.network import choose
from bench.paired import Paired, log_ratios
from parablock.units import format_rate, parse_rate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from rich.table import Table

    from bench.convergence_cases import Case
    from bench.learning_curve import LearningCurve

Number = TypeVar("Number", int, float)

# Without and with --quick.
_SEEDS = ("0-2", "0")
_CASES = (",".join(CASES), f"{REFERENCE},parablock")
_QUICK = ("rounds=8", "solver.steps=8", "eval.every=2")

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. cases: fedbcd first. jobs: runs at a time."""

    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    given: Conditions
    out: Path | None
    jobs: int = 1


def measure(plan: Plan, folder: Path) -> None:
    """All runs, seed by seed; the result printed and kept."""
    by_seed: dict[str, dict[int, LearningCurve]] = {case.name: {} for case in plan.cases}
    began, runs = time.monotonic(), len(plan.seeds) * len(plan.cases)
    with contextlib.closing(_trained(plan, folder)) as trained:
        for done, (case, seed, found) in enumerate(trained, start=1):
            by_seed[case.name][seed] = found
            left_s = (time.monotonic() - began) / done * (runs - done)
            _console.print(
                f"seed {seed} ({plan.seeds.index(seed) + 1} of {len(plan.seeds)}), {case.name}: final held-out loss "
                f"{found.final_loss:.5f} after {found.time_s:.1f} s; {left_s / 60:.0f} min left"
            )
    curves = {name: [own[seed] for seed in plan.seeds] for name, own in by_seed.items()}
    rows = [row(case, curves[case.name], curves[REFERENCE], plan.given) for case in plan.cases]
    _console.print(table(rows, plan.given, plan.jobs))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _trained(plan: Plan, folder: Path) -> Generator[tuple[Case, int, LearningCurve], None, None]:
    """All runs, as they end."""
    asked: list[tuple[Case, int]] = []
    for turn, seed in enumerate(plan.seeds):
        first = turn % len(plan.cases)
        asked += [(case, seed) for case in (*plan.cases[first:], *plan.cases[:first])]
    if plan.jobs > 1:
        yield from convergence_cases.train_many(asked, plan.given, plan.jobs, folder)
        return
    for case, seed in asked:
        yield case, seed, convergence_cases.train(case, seed, plan.given, folder / f"{case.name}-{seed}")


def row(
    case: Case, curves: Sequence[LearningCurve], reference: Sequence[LearningCurve], given: Conditions
) -> dict[str, Any]:
    """A case against fedbcd, seed by seed. Gaps above zero are worse. bytes: payload of one client, up and down."""
    losses = [each.final_loss for each in curves]
    pairs = list(zip(curves, reference, strict=True))
    speedups = [speedup(*pair) for pair in pairs]
    gap = Paired(tuple(log_ratios(losses, [each.final_loss for each in reference])))
    points = list(zip(*(each.points for each in curves), strict=True))  # by evaluation, those of all seeds
    return {
        "case": case.name,
        "lr": given.settings(case, 0).solver.lr,
        "rounds": curves[0].points[-1].rounds,
        "final_loss": statistics.geometric_mean(losses),
        "final_losses": losses,
        "gap": None if case.name == REFERENCE else gap.told(),
        "time_s": statistics.fmean(each.time_s for each in curves),
        "compute_s": _mean(each.compute_s for each in curves),
        "comm_s": _mean(each.comm_s for each in curves),
        "speedup_at_equal_loss": median(speedups),
        "speedups": speedups,
        "reached": sum(each is not None for each in speedups),
        "equal_loss_s": [ours.time_to(its.final_loss) for ours, its in pairs],
        "share_of_time": share(speedups),
        "bytes": statistics.fmean(each.nbytes for each in curves) / given.clients,
        "rounds_by_evaluation": [seeds[0].rounds for seeds in points],
        "time_s_by_evaluation": [statistics.fmean(each.time_s for each in seeds) for seeds in points],
        "bytes_by_evaluation": [statistics.fmean(each.nbytes for each in seeds) / given.clients for seeds in points],
        "loss_by_evaluation": [statistics.geometric_mean(each.loss for each in seeds) for seeds in points],
        "lowest_by_evaluation": [min(each.loss for each in seeds) for seeds in points],
        "highest_by_evaluation": [max(each.loss for each in seeds) for seeds in points],
    }


def _mean(told: Iterable[float | None]) -> float | None:
    found = [each for each in told if each is not None]
    return statistics.fmean(found) if found else None


def speedup(curve: LearningCurve, reference: LearningCurve) -> float | None:
    """The reference's time to its final loss over the curve's time to that loss.

    None where the curve never gets there, and where the reference has learnt nothing.
    """
    its, ours = reference.time_to(reference.final_loss), curve.time_to(reference.final_loss)
    return its / ours if its and ours else None


def share(speedups: Sequence[float | None]) -> dict[str, float | None] | None:
    """Of the reference's time, until its final loss: geometric mean over seeds, and the 95 % interval of that.

    None where a run never got there; low and high None with one seed.
    """
    logs = [-math.log(each) for each in speedups if each is not None]
    if len(logs) < len(speedups):
        return None
    found = Paired(tuple(logs))
    low, high = map(math.exp, found.interval) if len(logs) > 1 else (None, None)
    return {"mean": math.exp(found.mean), "low": low, "high": high}


def median(speedups: Sequence[float | None]) -> float | None:
    """The lower median over seeds, None, for never, being lower than any number."""
    found = statistics.median_low(-math.inf if each is None else each for each in speedups)
    return None if found == -math.inf else found


def result(rows: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object of design §6. gap_pct: with its 95 % interval, None where one seed has none."""
    return {
        "bench": "convergence",
        "final_loss": {each["case"]: each["final_loss"] for each in rows},
        "gap_pct": {each["case"]: _gap(each) for each in rows if each["gap"] is not None},
        "speedup_at_equal_loss": {each["case"]: each["speedup_at_equal_loss"] for each in rows},
        "share_of_time_at_equal_loss": {each["case"]: each["share_of_time"] for each in rows},
        "bytes": {each["case"]: each["bytes"] for each in rows},
        "rows": rows,
        "seeds": list(plan.seeds),
        "clients": plan.given.clients,
        "config": str(plan.given.config or "quickstart"),
        "overrides": list(plan.given.overrides),
        "link": plan.given.link,
        "rate_bytes_s": plan.given.link_rate,
        "jobs": plan.jobs,
        "times_compare": plan.jobs == 1,
        "machine": results.machine(),
    }


def _gap(row: Mapping[str, Any]) -> dict[str, float | None]:
    gap = row["gap"]
    return {"mean": gap["gap_pct"], "low": gap["low_pct"], "high": gap["high_pct"]}


def table(rows: Sequence[dict[str, Any]], given: Conditions, jobs: int = 1) -> Table:
    """The rows for people. jobs: runs at a time."""
    seeds = len(rows[0]["final_losses"])

    def equal(row: dict[str, Any]) -> str:
        told = "–" if row["speedup_at_equal_loss"] is None else f"{row['speedup_at_equal_loss']:.2f}"
        return f"{told} ({row['reached']} of {seeds})"

    def part(row: dict[str, Any]) -> str:
        found = row["share_of_time"]
        if found is None or found["low"] is None:
            return "–" if found is None else f"{found['mean']:.2f}"
        return f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f})"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "case": lambda row: row["case"],
        " lr": lambda row: f"{row['lr']:g}",
        " rounds": lambda row: str(row["rounds"]),
        " final loss": lambda row: f"{row['final_loss']:.5f}",
        " gap, 95 %": lambda row: paired.text(row["gap"]),
        " C": lambda row: _seconds(row["compute_s"]),
        " M": lambda row: _seconds(row["comm_s"]),
        " time": lambda row: f"{row['time_s']:.1f}",
        " speed-up": equal,
        " share of time": part,
        " MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    }
    link = "loopback" if given.link_rate is None else f"{given.link} links of {format_rate(given.link_rate)} each way"
    caption = (
        f"{seeds} seed{'s' * (seeds != 1)}, {given.clients} clients, {link}; gaps to {REFERENCE} in per cent, paired "
        "by seed; C, M, time: a round's compute, its exchange, and the whole run, in s; speed-up at "
        f"{REFERENCE}'s final loss, median (seeds that got there); share of its time until then, 95 %; MB of payload "
        "of one client, up and down; but for the learning rate (lr) and rounds all other settings are equal"
    )
    if jobs > 1:
        caption += f"; {jobs} runs at a time, so that TIMES AND SPEED-UPS DO NOT COMPARE"
    return results.table(columns, rows, caption)


def _seconds(told: float | None) -> str:
    return "–" if told is None else f"{told:.2f}"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Held-out loss by round, time and bytes, with the range over seeds, and the gaps with their intervals.

    Bytes are on a logarithmic axis, without the loss before training, when there were none.

    By time, the dashed line is the reference's final loss; the ticks on it are where each seed's run was first as low.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    (by_round, by_time), (by_bytes, gaps) = figure.subplots(2, 2)
    for axes, key, scale, label, first in (
        (by_round, "rounds_by_evaluation", 1.0, "rounds", 0),
        (by_time, "time_s_by_evaluation", 1.0, "time (s), mean over seeds", 0),
        (by_bytes, "bytes_by_evaluation", 1e-6, "MB of one client, up and down, once it has trained", 1),
    ):
        for each in rows:
            places = [scale * place for place in each[key][first:]]
            (line,) = axes.plot(places, each["loss_by_evaluation"][first:], label=each["case"], linewidth=1)
            band = (each["lowest_by_evaluation"][first:], each["highest_by_evaluation"][first:])
            axes.fill_between(places, *band, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel=label, ylabel="held-out loss (nats per token)", yscale="log")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))  # 2.2, not 2.2 x 10^0
        axes.grid(alpha=0.3)
    by_bytes.set_xscale("log")  # from adapters to the whole model
    for place, each in enumerate(rows):  # when each seed's run first was where the reference's ended
        found = [time_s for time_s in each["equal_loss_s"] if time_s is not None]
        by_time.plot(found, [rows[0]["final_loss"]] * len(found), color=f"C{place}", marker="|", linestyle="none")
    by_time.axhline(rows[0]["final_loss"], color="black", linewidth=0.5, linestyle="--")
    by_round.legend(fontsize=8)
    compared = [(place, each) for place, each in enumerate(rows) if each["gap"] is not None]
    for place, each in compared:
        gap, colour = each["gap"], f"C{place}"  # as its curve's
        mean, *ends = (
            100 * math.log1p(gap[key] / 100) for key in ("gap_pct", "low_pct", "high_pct") if gap[key] is not None
        )
        gaps.plot(ends, [place] * len(ends), color=colour)
        gaps.plot([mean], [place], color=colour, marker="o", markersize=4)
    gaps.axvline(0, color="black", linewidth=0.5)
    gaps.set_yticks([place for place, _ in compared], [each["case"] for _, each in compared])
    gaps.invert_yaxis()
    # A wide interval has ends of −80 % and +400 %, and would leave no room for a narrow one.
    gaps.set_xlabel(f"100 ln (final loss / {REFERENCE}'s): about %, 95 % interval")
    gaps.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("convergence", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("convergence", __doc__, quick="fedbcd and parablock, one seed, eight short rounds")
    add = parser.add_argument
    add("--cases", help=f"of {', '.join(CASES)} (default: all); {REFERENCE} is always run")
    add("--seeds", help=f"seeds of the runs, as 0,1,2 or 0-19 (default: {_SEEDS[False]})")
    add("--clients", type=int, default=2, help="workers of each run (default: 2)")
    add("--config", type=Path, metavar="FILE", help="settings of every run (default: the quickstart's)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run; repeatable")
    add("--lr", action="append", default=[], metavar="CASE=VALUE", help="a case's own learning rate; repeatable")
    add("--rounds", action="append", default=[], metavar="CASE=N", help="a case's own number of rounds; repeatable")
    add("--rate", help="rate of each client's link, as 20mbit or 5MB/s (default: loopback)")
    add("--jobs", type=int, default=1, help="runs at a time; from 2 on their times do not compare (default: 1)")
    add("--link", choices=("auto", "kernel", "user"), default="auto", help="what shapes the links (with --rate)")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    quick = options.quick
    if quick and (options.seeds is not None or options.cases is not None):
        raise ValueError(
            "--quick is one seed of fedbcd and parablock within 60 s; leave it out for other seeds or cases"
        )
    seeds = command.seeds(options.seeds if options.seeds is not None else _SEEDS[quick])
    cases = _cases(options.cases if options.cases is not None else _CASES[quick])
    if options.clients < 1:
        raise ValueError(f"--clients must be at least 1, got {options.clients}")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    if options.jobs > 1 and options.rate is not None:
        raise ValueError("--jobs lets runs share the machine, and --rate is there to compare times; leave one out")
    given = Conditions(
        config=options.config,
        overrides=(*(_QUICK if quick else ()), *_overrides(options.set)),
        rates=_own("--lr", "a number, as lora=1e-3", float, options.lr, cases),
        rounds=_own("--rounds", "a whole number, as parablock=35", int, options.rounds, cases),
        clients=options.clients,
        link="loopback",
        link_rate=None,
    )
    for case in cases:  # what fits not all of them is told now
        asked = given.settings(case, seeds[0])
        if not asked.data.eval:
            raise ValueError("data.eval names no held-out rows, by whose loss runs are compared; set it")
    if options.rate is None:
        if options.link != "auto":
            raise ValueError(f"--link {options.link} shapes links, and there are none without --rate; add it")
        return Plan(cases, seeds, given, options.out, options.jobs)
    rate = parse_rate(options.rate)
    kind, reason = choose(options.link, 0.0)
    _console.print(reason)
    return Plan(cases, seeds, replace(given, link=kind, link_rate=rate), options.out)


def _cases(text: str) -> tuple[Case, ...]:
    names = text.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"--cases takes {', '.join(CASES)}, separated by commas; got {', '.join(unknown)}")
    cases = tuple(CASES[name] for name in dict.fromkeys([REFERENCE, *names]))
    for package, needing in convergence_cases.missing(cases).items():
        others = ",".join(case.name for case in cases if case.name not in needing)
        raise ValueError(
            f"{package}, for {' and '.join(needing)}, is not installed: pip install -c constraints.txt -e '.[lora]', "
            f"or leave out what needs it with --cases {others}"
        )
    return cases


def _overrides(asked: Sequence[str]) -> Sequence[str]:
    for each in asked:
        key = each.partition("=")[0].strip()
        if key in TAKEN:
            raise ValueError(f"--set {key} is not possible: the benchmark sets it; use --cases, --seeds or --clients")
    return asked


def _own(
    option: str, wanted: str, kind: Callable[[str], Number], asked: Sequence[str], cases: Sequence[Case]
) -> dict[str, Number]:
    """What an option gives cases of their own, by case. wanted: the value, for people. kind: makes it of the text."""
    names = [case.name for case in cases]
    found: dict[str, Number] = {}
    for each in asked:
        name, _, value = each.partition("=")
        if name not in names or name in found:
            raise ValueError(f"{option} takes CASE=VALUE, once for a case of {', '.join(names)}; got {each!r}")
        try:
            found[name] = kind(value)
        except ValueError:
            raise ValueError(f"{option} takes CASE=VALUE with {wanted}; got {each!r}") from None
    return found


if __name__ == "__main__":
    sys.exit(main())
