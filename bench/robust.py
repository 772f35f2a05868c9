"""What bad clients do to a run by each robust rule: the final held-out loss under attack against the clean run's.

    python -m bench.robust --seeds 0-1 --jobs 2 --out robust.json
    python -m bench.robust --attacks hidden --rules krum,multi-krum
    python -m bench.robust --quick

The built-in model on the built-in problem, whose rows are dealt out in turn; f of n clients send something else than
they have trained (`bench.attacks`), all others are honest. Losses are those of simulated runs (`bench.simulation`). A
gap is a mean over seeds, against the mean's run with no bad client, and against the same rule's; the bar is 5 %.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, results, simulation
from bench.attacks import ATTACKS, Attack
from bench.paired import percent
from parablock import config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rich.table import Table

    from parablock.config import Config

BAR = math.log(1.05)

CLEAN = "none"
MEAN = "mean"

RULES: Mapping[str, tuple[str, ...]] = {
    MEAN: (),
    "clipped mean": ("robust.clip_ratio=1",),
    "median": ("robust.rule=median",),
    "trimmed-mean": ("robust.rule=trimmed-mean",),
    "krum": ("robust.rule=krum",),
    "multi-krum": ("robust.rule=multi-krum",),
}
"""Settings of each, without how many bad clients it shall bear."""

_SETTINGS = (
    "data.train=builtin", "data.eval=builtin", "data.max_tokens=256", "eval.rows=32", "eval.batch_size=32",
    "solver.lr=3e-3",
)  # fmt: skip

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)

Found = dict[tuple[str, str, int], float]
"""Final held-out losses, by rule, attack and seed."""


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. rules: the mean first. attacks: none first. bad: how many clients are."""

    rules: tuple[str, ...]
    attacks: tuple[str, ...]
    clients: int
    bad: int
    steps: int
    rounds: int
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    jobs: int
    out: Path | None

    def settings(self, rule: str, seed: int) -> Config:
        """Of one run. Raises ConfigError."""
        borne = (f"robust.bad={self.bad}",) if "robust.rule" in "".join(RULES[rule]) else ()
        return config.load(
            None,
            [
                *_SETTINGS, f"round.clients={self.clients}", f"solver.steps={self.steps}", f"rounds={self.rounds}",
                *self.overrides, *RULES[rule], *borne, f"seed={seed}",
            ],
        )  # fmt: skip


def measure(plan: Plan, _folder: Path) -> None:
    """All runs; the result printed and kept."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["bench.simulation"])
    with ProcessPoolExecutor(plan.jobs, mp_context=forks) as pool:
        try:
            found = _losses(plan, pool)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # nobody wants what they are at any more
                child.terminate()
            raise
    rows = [row(rule, attack, plan.seeds, found) for rule, attack in product(plan.rules, plan.attacks)]
    _console.print(table(rows, plan))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _losses(plan: Plan, pool: ProcessPoolExecutor) -> Found:
    asked = {}
    for seed, rule, attack in product(plan.seeds, plan.rules, plan.attacks):
        forge = None if attack == CLEAN else Attack(attack, plan.bad, seed)
        asked[pool.submit(simulation.outcome, plan.settings(rule, seed), None, forge)] = rule, attack, seed
    found: Found = {}
    began = time.monotonic()
    for done in as_completed(asked):
        rule, attack, seed = asked[done]
        found[rule, attack, seed] = done.result().loss
        left_s = (time.monotonic() - began) / len(found) * (len(asked) - len(found))
        _console.print(
            f"{len(found)} of {len(asked)}: {rule}, attack {attack}, seed {seed}: held-out loss "
            f"{found[rule, attack, seed]:.4f}; {left_s / 60:.0f} min left"
        )
    return found


def row(rule: str, attack: str, seeds: Sequence[int], found: Mapping[tuple[str, str, int], float]) -> dict[str, Any]:
    """A rule under an attack. Gaps above zero are worse; without an end (null) where the loss is none."""
    losses = [found[rule, attack, seed] for seed in seeds]
    to_clean, to_own = (_gap_pct(losses, [found[each, CLEAN, seed] for seed in seeds]) for each in (MEAN, rule))
    return {
        "rule": rule,
        "attack": attack,
        "final_losses": [loss if math.isfinite(loss) else None for loss in losses],
        "gap_pct": to_clean,
        "gap_to_own_pct": to_own,
        "within_bar": to_clean is not None and to_clean <= percent(BAR),
    }


def _gap_pct(losses: Sequence[float], reference: Sequence[float]) -> float | None:
    ratios = [math.log(a / b) for a, b in zip(losses, reference, strict=True) if math.isfinite(a)]
    return percent(statistics.fmean(ratios)) if len(ratios) == len(losses) else None


def result(rows: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object. worst_gap_pct: by rule, of its attacks; null where a run has blown up."""
    worst: dict[str, float | None] = {}
    for rule in plan.rules:
        gaps = [each["gap_pct"] for each in rows if each["rule"] == rule and each["attack"] != CLEAN]
        worst[rule] = None if None in gaps else max(gaps, default=None)
    return {
        "bench": "robust",
        "worst_gap_pct": worst,
        "bar_pct": percent(BAR),
        "clients": plan.clients,
        "bad": plan.bad,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "overrides": list(plan.overrides),
        "seeds": list(plan.seeds),
        "rows": list(rows),
        "machine": results.machine(),
    }


def table(rows: Iterable[dict[str, Any]], plan: Plan) -> Table:
    """The rows for people."""
    columns = {
        "rule": lambda row: row["rule"],
        " attack": lambda row: row["attack"],
        " final losses": lambda row: ", ".join("–" if loss is None else f"{loss:.4f}" for loss in row["final_losses"]),
        " gap to the clean mean": lambda row: _percent(row["gap_pct"]),
        " to the rule's own clean run": lambda row: _percent(row["gap_to_own_pct"]),
        " bar": lambda row: "within" if row["within_bar"] else "beyond",
    }
    caption = (
        f"{plan.bad} of {plan.clients} clients are bad; K = {plan.steps}, {plan.rounds} rounds, {len(plan.seeds)} seeds"
    )
    return results.table(columns, rows, caption)


def _percent(gap: float | None) -> str:
    return "no end" if gap is None else f"{gap:+.1f} %"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """The gaps, by rule and attack, and the bar."""
    rules, attacks = (list(dict.fromkeys(each[key] for each in rows)) for key in ("rule", "attack"))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for number, attack in enumerate(attacks):
        gaps = [each["gap_pct"] for each in rows if each["attack"] == attack]
        heights = [math.nan if gap is None else gap for gap in gaps]
        places = [place + 0.8 * (number + 0.5) / len(attacks) - 0.4 for place in range(len(rules))]
        axes.bar(places, heights, 0.8 / len(attacks), label=f"attack: {attack}", color=f"C{number}")
    axes.axhline(percent(BAR), color="black", linewidth=0.5, linestyle="--")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_xticks(range(len(rules)), rules)
    axes.set_ylabel("final held-out loss, % above the clean mean's")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("robust", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "robust", __doc__, quick="mean and median, one attack, 3 clients, K = 1, 4 rounds, one seed"
    )
    add = parser.add_argument
    add("--rules", default=",".join(RULES), help=f"of {', '.join(RULES)} (default: all; the mean always)")
    add("--attacks", default=",".join(ATTACKS[:-1]), help=f"of {', '.join(ATTACKS)} (default: all but the last)")
    add("--clients", type=int, default=7, help="of a run (default: 7)")
    add("--bad", type=int, default=1, help="of these, how many are bad (default: 1)")
    add("--steps", type=int, default=4, help="K (default: 4)")
    add("--rounds", type=int, default=24, help="of each run (default: 24)")
    add("--seeds", default="0-1", help="seeds of the runs, as 0,1,2 or 0-19 (default: 0-1)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run; repeatable")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of one thread (default: 1)")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    if options.quick:
        plan = Plan(
            (MEAN, "median"), (CLEAN, "flipped"), 3, 1, 1, 4, (0,), tuple(options.set), options.jobs, options.out
        )
    else:
        plan = Plan(
            _named(options, "rules", RULES, MEAN), _named(options, "attacks", ATTACKS, CLEAN), options.clients,
            options.bad, options.steps, options.rounds, command.seeds(options.seeds), tuple(options.set),
            options.jobs, options.out,
        )  # fmt: skip
    if plan.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {plan.jobs}")
    if not 1 <= plan.bad < plan.clients:
        raise ValueError(f"--bad must be at least 1 and below --clients = {plan.clients}, got {plan.bad}")
    for rule in plan.rules:
        simulation.check(plan.settings(rule, plan.seeds[0]))
    return plan


def _named(options: argparse.Namespace, name: str, known: Iterable[str], first: str) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys([first, *getattr(options, name).split(",")]))
    if unknown := [each for each in asked if each not in (first, *known)]:
        raise ValueError(f"--{name} takes {', '.join(known)}, separated by commas; got {', '.join(unknown)}")
    return asked


if __name__ == "__main__":
    sys.exit(main())
