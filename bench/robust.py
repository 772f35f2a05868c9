"""What bad clients do to a run by each robust rule: the final held-out loss under attack against the clean run's.

    python -m bench.robust --jobs 2 --out robust.json
    python -m bench.robust --attacks hidden --rules krum,multi-krum
    python -m bench.robust --quick

The built-in model on the built-in problem, whose rows are dealt out in turn; f of n clients send something else than
they have trained (`bench.attacks`), all others are honest. Losses are those of simulated runs (`bench.simulation`).
Gaps are means over seeds with their 95 % confidence interval (Student's t on log ratios), to the mean's run with no bad
client, and to the same rule's; the bar is 5 %.

What the theory of robust rules promises is where a run ends, not how fast it gets there: where the gradient is no
longer than what the rule is off by, which is the less the closer honest contributions lie together (`bench.spread`; how
close they were stands beside the losses). So a model is fine-tuned that has learnt most of its problem already, by
plain SGD, which theorems are about (AdamW brings every element's step to one length, noise or signal). From random
weights, with --scratch, a run ends in the midst of its fall, and whatever makes steps shorter costs per cents. One bad
client of five is to Krum what one of seven is, and each trains on more rows for the same work.

What Krum's theory asks for takes thousands of rows a round and client, where each has rows of its own. With --same-rows
all clients have the same ones and each round takes every one of them once, so that honest contributions differ by the
order alone.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench import command, gap_plot, paired, results, simulation, simulations, spread
from bench.attacks import ATTACKS, Attack
from bench.paired import Paired, log_ratios, percent
from bench.simulations import Task
from parablock import config
from parablock.problems import problems

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from rich.table import Table

    from bench.attacks import Vector
    from parablock.config import Config

BAR = math.log(1.05)

CLEAN = "none"
MEAN = "mean"
CLIPPED = "clipped mean"

RULES: Mapping[str, tuple[str, ...]] = {
    MEAN: (),
    CLIPPED: ("robust.clip_ratio=1",),
    "median": ("robust.rule=median",),
    "trimmed-mean": ("robust.rule=trimmed-mean",),
    "krum": ("robust.rule=krum",),
    "multi-krum": ("robust.rule=multi-krum",),
}
"""Settings of each, without how many bad clients it shall bear."""

_SETTINGS = (
    "data.train=builtin", "data.eval=builtin", "data.max_tokens=256", "eval.rows=128", "eval.batch_size=32",
    "solver.batch_size=8",
)  # fmt: skip
_SGD = ("solver.optimizer=sgd", "solver.lr=0.25")
_PRETRAINING = ("mode=fedbcd", "rounds=32", "seed=1000", "solver.steps=8", "solver.lr=3e-3", "round.clients=4")

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Ended:
    """A run: its final held-out loss, and by round how far honest contributions lay apart (`bench.spread.ratio`)."""

    loss: float
    spreads: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. rules: the mean first. attacks: none first. bad: how many clients are.

    scratch: from random weights. same_rows: all clients have the same rows, as many as a round takes.
    """

    rules: tuple[str, ...]
    attacks: tuple[str, ...]
    clients: int
    bad: int
    steps: int
    rounds: int
    scratch: bool
    same_rows: bool
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    jobs: int
    out: Path | None

    def settings(self, rule: str, seed: int, model: str = "builtin", rows: str = "builtin") -> Config:
        """Of one run. rows: to train on. Raises ConfigError."""
        borne = (f"robust.bad={self.bad}",) if "robust.rule" in "".join(RULES[rule]) else ()
        return config.load(
            None,
            [
                *_SETTINGS, *_SGD, f"data.train={rows}", f"model={model}", f"round.clients={self.clients}",
                f"solver.steps={self.steps}", f"rounds={self.rounds}", *self.overrides, *RULES[rule], *borne,
                f"seed={seed}",
            ],
        )  # fmt: skip


def measure(plan: Plan, folder: Path) -> None:
    """All runs; the result printed and kept."""
    model = "builtin"
    if not plan.scratch:
        settings = config.load(None, [*_SETTINGS, *_PRETRAINING])
        model = simulations.pretrained(settings, folder / "pretrained", _console)
    shared = shared_rows(plan, folder) if plan.same_rows else "builtin"
    found = simulations.run(
        {
            (rule, attack, seed): Task(
                f"{rule}, attack {attack}, seed {seed}",
                outcome,
                (plan.settings(rule, seed, model, shared), None if attack == CLEAN else Attack(attack, plan.bad, seed)),
            )
            for seed, rule, attack in product(plan.seeds, plan.rules, plan.attacks)
        },
        plan.jobs,
        _console,
        lambda ended: f"held-out loss {ended.loss:.4f}",
    )
    rows = [row(rule, attack, plan, found) for rule, attack in product(plan.rules, plan.attacks)]
    _console.print(table(rows, plan))
    results.emit(result(rows, plan), plot(rows), plan.out)


def shared_rows(plan: Plan, folder: Path) -> str:
    """A file of which, dealt out in turn, each client gets the same rows: as many as it takes in a round."""
    solver = plan.settings(MEAN, plan.seeds[0]).solver
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in problems(solver.steps * solver.batch_size * solver.accumulate, plan.seeds[0], "train"):
            file.write((json.dumps(row) + "\n") * plan.clients)
    return str(path)


def outcome(settings: Config, attack: Attack | None) -> Ended:
    """One run."""
    spreads = []

    def forge(round: int, deltas: dict[int, Vector]) -> dict[int, Vector]:
        honest = [delta for client, delta in deltas.items() if attack is None or client >= attack.bad]
        spreads.append(spread.ratio(honest) if len(honest) > 1 else math.inf)  # the others' training has diverged
        return deltas if attack is None else attack(round, deltas)

    return Ended(simulation.outcome(settings, None, forge).loss, tuple(spreads))


def row(rule: str, attack: str, plan: Plan, found: Mapping[tuple[str, str, int], Ended]) -> dict[str, Any]:
    """A rule under an attack. Gaps above zero are worse; without an end (null) where the loss is none.

    spread: the median over rounds and seeds of `bench.spread.ratio`. asked: that times what the rule's theory asks for;
    null where there is none, or no end. asked_held: in which share of the rounds it was below 1.
    """
    ours = [found[rule, attack, seed] for seed in plan.seeds]
    losses = [each.loss for each in ours]
    to_clean, to_own = (_gap(losses, [found[each, CLEAN, seed].loss for seed in plan.seeds]) for each in (MEAN, rule))
    ratios = [ratio for each in ours for ratio in each.spreads]
    factor = spread.asked(rule, plan.clients, plan.bad)
    asked = [] if factor is None else [factor * ratio for ratio in ratios]
    return {
        "rule": rule,
        "attack": attack,
        "final_losses": [loss if math.isfinite(loss) else None for loss in losses],
        "gap": to_clean,
        "gap_to_own": to_own,
        "spread": _finite(statistics.median(ratios)),
        "asked": _finite(statistics.median(asked)) if asked else None,
        "asked_held": statistics.fmean(each < 1.0 for each in asked) if asked else None,
    }


def _gap(losses: Sequence[float], reference: Sequence[float]) -> dict[str, Any] | None:
    if not all(map(math.isfinite, losses)):
        return None
    return Paired(tuple(log_ratios(losses, reference))).told(BAR)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def result(rows: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object. worst_gap_pct, and to the rule's own clean run: by rule, of its attacks; null where a run has
    blown up. asked: of the rule's clean runs."""

    def worst(rule: str, key: str) -> float | None:
        gaps = [each[key] for each in rows if each["rule"] == rule and each["attack"] != CLEAN]
        return None if None in gaps else max((gap["gap_pct"] for gap in gaps), default=None)

    return {
        "bench": "robust",
        "worst_gap_pct": {rule: worst(rule, "gap") for rule in plan.rules},
        "worst_gap_to_own_pct": {rule: worst(rule, "gap_to_own") for rule in plan.rules},
        "asked": {each["rule"]: each["asked"] for each in rows if each["attack"] == CLEAN},
        "bar_pct": percent(BAR),
        "clients": plan.clients,
        "bad": plan.bad,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "scratch": plan.scratch,
        "same_rows": plan.same_rows,
        "settings": [*_SETTINGS, *_SGD],
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
        " gap to the clean mean": lambda row: _told(row["gap"]),
        " to the rule's own clean run": lambda row: _told(row["gap_to_own"]),
        " bar": lambda row: "beyond" if row["gap"] is None else row["gap"]["verdict"],
        " spread": lambda row: _number(row["spread"]),
        " asked": lambda row: "" if row["asked_held"] is None else f"{_number(row['asked'])} ({row['asked_held']:.0%})",
    }
    caption = (
        f"{'from scratch' if plan.scratch else 'fine-tuning'}, {plan.bad} of {plan.clients} clients are bad, K = "
        f"{plan.steps}, {'the same rows for all, ' if plan.same_rows else ''}{plan.rounds} rounds, "
        f"{len(plan.seeds)} seeds; gaps in per cent, paired by seed, "
        f"bar {percent(BAR):.0f}; spread: of honest contributions, over what they have in common, "
        "median over rounds; asked: what the rule's theory wants below 1 (and where it was)"
    )
    return results.table(columns, rows, caption)


def _told(gap: dict[str, Any] | None) -> str:
    return "no end" if gap is None else paired.text(gap)


def _number(value: float | None) -> str:
    return "no end" if value is None else f"{value:.2f}"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """The gaps, by rule and attack, and the bar."""
    gaps = [(each["rule"], f"attack: {each['attack']}", each["gap"]) for each in rows if each["gap"] is not None]
    return gap_plot.plot(gaps, "final held-out loss, % above the clean mean's", percent(BAR), linear_to=10.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("robust", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "robust", __doc__, quick="mean and median, one attack, 3 clients, K = 1, 4 rounds, one seed"
    )
    add = parser.add_argument
    robust = ",".join(rule for rule in RULES if rule != CLIPPED)
    add("--rules", default=robust, help=f"of {', '.join(RULES)} (default: {robust}; the mean always)")
    add("--attacks", default=",".join(ATTACKS[:-1]), help=f"of {', '.join(ATTACKS)} (default: all but the last)")
    add("--clients", type=int, default=5, help="of a run (default: 5)")
    add("--bad", type=int, default=1, help="of these, how many are bad (default: 1)")
    add("--steps", type=int, default=8, help="K (default: 8)")
    add("--scratch", action="store_true", help="begin with random weights, not with a model that is trained first")
    add("--same-rows", action="store_true", help="all clients have the same rows, and a round takes each once")
    simulations.add_options(parser, rounds=8)
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    if options.quick:
        plan = Plan(
            (MEAN, "median"), (CLEAN, "flipped"), 3, 1, 1, 4, True, options.same_rows, (0,), tuple(options.set),
            options.jobs, options.out,
        )  # fmt: skip
    else:
        plan = Plan(
            _named(options, "rules", RULES, MEAN), _named(options, "attacks", ATTACKS, CLEAN), options.clients,
            options.bad, options.steps, options.rounds, options.scratch, options.same_rows,
            command.seeds(options.seeds), tuple(options.set), options.jobs, options.out,
        )  # fmt: skip
    simulations.check_jobs(plan.jobs)
    if plan.same_rows and any(each.startswith("data.train=") for each in plan.overrides):
        raise ValueError("--same-rows makes rows of its own; leave out --set data.train, or --same-rows")
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
