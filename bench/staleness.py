"""What a round of staleness costs: parablock's final held-out loss against fedbcd's at equal rounds, in many settings.

    python -m bench.staleness --data ../shared/data --seeds 0-2 --jobs 2 --out staleness.json
    python -m bench.staleness --data ../shared/data --cases parablock,slow-one --clients 4 --steps 8
    python -m bench.staleness --data ../shared/data --variant sgd solver.optimizer=sgd solver.lr=0.3
    python -m bench.staleness --quick

The built-in model, byte by byte, on GSM8K from scratch; fine-tuned there after a run of fedbcd with another seed; on
instructions of eight tasks, dealt out in turn, and by Dirichlet(0.3) over the task. From a middle setting (4 clients,
K = 8, the data's own learning rate) one thing at a time is changed: clients, K, and with --rates the learning rate.
Case slow-one is parablock where the first client takes K / 2 steps a round: adaptive K of one half as fast;
slow-one-fedbcd is fedbcd with such a client: what the steps that nobody takes cost alone. Case longer is parablock with
a tenth more rounds, for which it still needs no more than 0.6 of fedbcd's time where M = C. With --variant there are
cases of one's own: parablock with settings of their own, a mode among them (an optimizer, a server's, a baseline).
fedbcd~ and parablock~ begin with values that are off by a millionth: what that does to a loss any change does, however
small, so that a gap tells something only where it is larger than fedbcd~'s.
Losses are those of simulated runs (`bench.simulation`): what a run of processes gives, without its time. Gaps are means
over seeds with their 95 % confidence interval (Student's t on log ratios), held against a bar of 0.5 %.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench import command, gap_plot, paired, results, simulation, simulations
from bench.convergence_cases import CASES, REFERENCE
from bench.paired import Paired, log_ratios, percent
from bench.simulations import Task
from parablock import config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.figure import Figure
    from rich.table import Table

    from bench.simulation import Outcome
    from parablock.config import Config

BAR = math.log(1.005)

_COMMON = ("data.max_tokens=256", "eval.rows=256", "eval.batch_size=32")
_GSM8K = ("gsm8k", "data.prompt=question", "data.completion=answer")
_TASKS = ("instructions", "data.prompt=instruction", "data.completion=response")
_BUILTIN = ("builtin", "eval.rows=16")
_PRETRAINING = ("mode=fedbcd", "rounds=64", "seed=1000", "solver.lr=3e-3", "round.clients=4")

SLOW = {"slow-one": "parablock", "slow-one-fedbcd": REFERENCE}
"""Cases in which the first client takes half of the steps, and what they are otherwise."""

LONGER = "longer"
DISTURBED = {f"{case}~": case for case in (REFERENCE, "parablock")}
"""Cases that begin with other values, and what they are otherwise."""

DISTURBANCE = 1e-6
"""By how much of themselves those are off, at one standard deviation: some ten units in float32's last place."""

KNOWN = (REFERENCE, "parablock", "own", "stale", *SLOW, LONGER, *DISTURBED)
"""The cases."""

MIDDLE = (4, 8, 1.0)
"""Clients, K, and the factor of the learning rate."""

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Problem:
    """What is learnt. rows: their source, and settings that go with it. pretrained: first, by fedbcd.

    lr: near the best for fedbcd of the two or three that were tried, in 32 or 48 rounds of 4 clients and 8 steps; for
    `tasks` it was not looked for: it is that of `dirichlet`.
    """

    rows: tuple[str, ...]
    lr: float
    pretrained: bool = False


PROBLEMS = {
    "scratch": Problem(_GSM8K, 1e-2),
    "fine-tuning": Problem(_GSM8K, 3e-3, pretrained=True),
    "tasks": Problem(_TASKS, 6e-3),
    "dirichlet": Problem((*_TASKS, "partition.method=dirichlet", "partition.field=task", "partition.alpha=0.3"), 6e-3),
    "builtin": Problem(_BUILTIN, 1e-3),
}
"""By name. The last one needs no files."""


@dataclass(frozen=True)
class Cell:
    """One setting. rate: times the problem's learning rate."""

    problem: str
    clients: int
    steps: int
    rate: float

    @property
    def name(self) -> str:
        faster = "" if self.rate == 1.0 else f", lr × {self.rate:g}"
        return f"{self.problem}, {self.clients} clients, K = {self.steps}{faster}"


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. cases: fedbcd first. data: the folder of the rows' files."""

    cells: tuple[Cell, ...]
    cases: tuple[str, ...]
    seeds: tuple[int, ...]
    rounds: int
    overrides: tuple[str, ...]
    data: Path | None
    jobs: int
    out: Path | None
    variants: Mapping[str, tuple[str, ...]]
    """By name of the case, what it differs in from parablock."""

    def settings(self, cell: Cell, case: str, seed: int, model: str) -> Config:
        """Of one run. Raises ConfigError."""
        problem = PROBLEMS[cell.problem]
        return config.load(
            None,
            [
                *self.sources(problem), f"model={model}", f"round.clients={cell.clients}",
                f"rounds={round(1.1 * self.rounds) if case == LONGER else self.rounds}",
                f"solver.steps={cell.steps}", f"solver.lr={problem.lr * cell.rate!r}", *self.overrides,
                *CASES[self._like(case)].settings, *self.variants.get(case, ()), f"seed={seed}",
            ],
        )  # fmt: skip

    def steps(self, cell: Cell, case: str) -> tuple[int, ...] | None:
        """Of each client in a round; None: `solver.steps` of all."""
        return (cell.steps // 2, *(cell.steps,) * (cell.clients - 1)) if case in SLOW else None

    def _like(self, case: str) -> str:
        """The case of `bench.convergence_cases` that it is, but for what makes it a case of its own here."""
        return "parablock" if case == LONGER or case in self.variants else {**SLOW, **DISTURBED}.get(case, case)

    def sources(self, problem: Problem) -> list[str]:
        name, *more = problem.rows
        files = ("builtin", "builtin") if self.data is None else (f"{self.data / name}_{s}.jsonl" for s in _SPLITS)
        return [f"{key}={file}" for key, file in zip(("data.train", "data.eval"), files, strict=True)] + [
            *_COMMON,
            *more,
        ]


_SPLITS = ("train", "test")


def measure(plan: Plan, folder: Path) -> None:
    """All runs; the result printed and kept."""
    found = _outcomes(plan, folder)
    rows = [row(cell, case, plan.seeds, found) for cell, case in product(plan.cells, plan.cases)]
    _console.print(table(rows, plan))
    results.emit(result(rows, plan), plot(rows), plan.out)


def _outcomes(plan: Plan, folder: Path) -> dict[tuple[Cell, str, int], Outcome]:
    model = "builtin"
    if any(PROBLEMS[cell.problem].pretrained for cell in plan.cells):
        settings = config.load(None, [*plan.sources(PROBLEMS["fine-tuning"]), *_PRETRAINING])
        model = simulations.pretrained(settings, folder / "pretrained", _console)

    def task(cell: Cell, case: str, seed: int) -> Task[Outcome]:
        base = model if PROBLEMS[cell.problem].pretrained else "builtin"
        disturbance = DISTURBANCE if case in DISTURBED else 0.0
        arguments = plan.settings(cell, case, seed, base), plan.steps(cell, case), None, disturbance
        return Task(f"{cell.name}, {case}, seed {seed}", simulation.outcome, arguments)

    tasks = {
        (cell, case, seed): task(cell, case, seed) for seed, cell, case in product(plan.seeds, plan.cells, plan.cases)
    }
    return simulations.run(tasks, plan.jobs, _console, lambda outcome: f"held-out loss {outcome.loss:.5f}")


def row(cell: Cell, case: str, seeds: Sequence[int], found: Mapping[tuple[Cell, str, int], Outcome]) -> dict[str, Any]:
    """A case in a cell against fedbcd there, seed by seed. Gaps above zero are worse."""
    ours, its = ([found[cell, each, seed] for seed in seeds] for each in (case, REFERENCE))
    losses = [each.loss for each in ours]
    gap = None
    if case != REFERENCE:
        gap = Paired(tuple(log_ratios(losses, [each.loss for each in its]))).told(BAR)
    return {
        "problem": cell.problem,
        "clients": cell.clients,
        "steps": cell.steps,
        "rate": cell.rate,
        "setting": cell.name,
        "case": case,
        "final_loss": statistics.geometric_mean(losses),
        "final_losses": losses,
        "gap": gap,
        "miss": statistics.fmean(each.miss for each in ours),
        "synchronous": sum(each.synchronous for each in ours),
    }


def result(rows: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The JSON object. worst_gap_pct: of the means over seeds, by case."""
    gaps: dict[str, list[float]] = {}
    for each in rows:
        if each["gap"] is not None:
            gaps.setdefault(each["case"], []).append(each["gap"]["gap_pct"])
    return {
        "bench": "staleness",
        "worst_gap_pct": {case: max(of) for case, of in gaps.items()},
        "bar_pct": percent(BAR),
        "rounds": plan.rounds,
        "overrides": list(plan.overrides),
        "variants": {name: list(of) for name, of in plan.variants.items()},
        "seeds": list(plan.seeds),
        "rows": list(rows),
        "machine": results.machine(),
    }


def table(rows: Iterable[dict[str, Any]], plan: Plan) -> Table:
    """The rows for people."""
    columns = {
        "setting": lambda row: row["setting"],
        " case": lambda row: row["case"],
        " final loss": lambda row: f"{row['final_loss']:.5f}",
        " gap, 95 %": lambda row: paired.text(row["gap"]),
        " miss": lambda row: f"{row['miss']:.2f}",
        " synchronous": lambda row: str(row["synchronous"]),
    }
    caption = (
        f"{len(plan.seeds)} seeds, {plan.rounds} rounds; gaps to {REFERENCE} in per cent, paired by seed; miss: how "
        "far off guesses were, in lengths of the step; synchronous: rounds, of all clients and seeds, that the guard "
        "held back"
    )
    return results.table(columns, rows, caption)


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """The gaps with their intervals, and the bar."""
    gaps = [(each["setting"], each["case"], each["gap"]) for each in rows if each["gap"] is not None]
    return gap_plot.plot(gaps, f"final held-out loss, % above {REFERENCE}'s", percent(BAR))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("staleness", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("staleness", __doc__, quick="the built-in problem, 2 clients, K = 2, one seed, 8 rounds")
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with gsm8k_train.jsonl, instructions_test.jsonl and so on")
    add(
        "--problems",
        default=",".join(list(PROBLEMS)[:-1]),
        help=f"of {', '.join(PROBLEMS)} (default: all but the last)",
    )
    add("--clients", default="2,4,8", help="numbers of clients (default: 2,4,8)")
    add("--steps", default="4,8,16", help="numbers of steps, K (default: 4,8,16)")
    add("--rates", default="1", help="factors of each problem's learning rate (default: 1)")
    add(
        "--cases",
        default=f"{REFERENCE},parablock",
        help=f"of {', '.join(KNOWN)} (default: the first two)",
    )
    add(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="one more case: parablock with these settings; repeatable",
    )
    simulations.add_options(parser, rounds=32)
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    if options.quick:
        cells = (Cell("builtin", 2, 2, 1.0),)
        if options.variant:
            raise ValueError("--quick has two cases, and takes no --variant; leave the one or the other out")
        cases = REFERENCE, "parablock"
        plan = Plan(cells, cases, (0,), 8, tuple(options.set), None, options.jobs, options.out, {})
    else:
        variants = _variants(options.variant)
        cases = tuple(dict.fromkeys([REFERENCE, *options.cases.split(","), *variants]))
        plan = Plan(
            _cells(options), cases, command.seeds(options.seeds), options.rounds, tuple(options.set), options.data,
            options.jobs, options.out, variants,
        )  # fmt: skip
    if unknown := [case for case in plan.cases if case not in KNOWN and case not in plan.variants]:
        raise ValueError(f"--cases takes {', '.join(KNOWN)}, separated by commas; got {', '.join(unknown)}")
    slow = [case for case in plan.cases if case in SLOW]
    if slow and (odd := [cell.name for cell in plan.cells if cell.steps % 2]):
        raise ValueError(f"{slow[0]} halves K, which must be even; got {odd[0]}")
    simulations.check_jobs(plan.jobs)
    if plan.data is None and any(cell.problem != "builtin" for cell in plan.cells):
        raise ValueError("--data names the folder with the rows; or take --problems builtin, which needs none")
    for cell, case in product(plan.cells, plan.cases):
        simulation.check(plan.settings(cell, case, plan.seeds[0], "builtin"))
    return plan


def _variants(asked: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, *given in asked:
        if name in KNOWN or name in found or "=" in name or not given:
            raise ValueError(f"--variant takes a new name and what it sets, as sgd solver.optimizer=sgd; got {name!r}")
        if own := [each for each in given if each.partition("=")[0] in ("seed", "round.clients")]:
            raise ValueError(f"seeds and clients are the same for all cases; leave {own[0]} out of --variant {name}")
        found[name] = tuple(given)
    return found


def _cells(options: argparse.Namespace) -> tuple[Cell, ...]:
    """One thing at a time is changed from the middle; where the middle is not asked for, from the first values."""
    problems = options.problems.split(",")
    if unknown := [name for name in problems if name not in PROBLEMS]:
        raise ValueError(f"--problems takes {', '.join(PROBLEMS)}, separated by commas; got {', '.join(unknown)}")
    clients, steps, rates = (_numbers(options, name) for name in ("clients", "steps", "rates"))
    axes = (clients, steps, rates)
    middle = [value if value in axis else axis[0] for axis, value in zip(axes, MIDDLE, strict=True)]
    star = [(*middle[:at], value, *middle[at + 1 :]) for at, axis in enumerate(axes) for value in axis]
    return tuple(
        Cell(problem, int(count), int(taken), rate)
        for problem in problems
        for count, taken, rate in dict.fromkeys(sorted(star, key=lambda each: each != tuple(middle)))
    )


def _numbers(options: argparse.Namespace, name: str) -> list[float]:
    text = getattr(options, name)
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or any(each <= 0 or (name != "rates" and each != int(each)) for each in found):
        raise ValueError(f"--{name} takes numbers above 0, separated by commas, as {_EXAMPLES[name]}; got {text!r}")
    return found


_EXAMPLES = {"clients": "2,4,8", "steps": "4,8,16", "rates": "0.25,1,4"}


if __name__ == "__main__":
    sys.exit(main())
