"""How much of the exchange hides behind compute: fedbcd against parablock over a shaped link (design §6).

    python -m bench.overlap --quick --out overlap.json
    python -m bench.overlap --clients 1,2 --regime 0.5,1,2 --repeat 3 --plan
    python -m bench.overlap --shape llama-3.2-1b --steps 64 --link user     # where torch sees a GPU, on that

For each number of clients, a short synchronous run over a link of a guessed rate (two, where there is a delay)
gives C and M; from them comes the rate at which M is the asked multiple of C. Then both modes run over links of that
rate, as real processes: one broker, and workers with one compute thread each. With --plan, `parablock plan` predicts
the round times first, over links of the same rate. With --journal, parablock runs as often again under a broker that
keeps nothing on disk, in turn, which says what the journal costs; with --encryption, over connections that are not
encrypted, which says what that costs. With --shape the model is one of `bench.shapes`, a decoder layer a block, so that
compute_slowdown says what transfers on the way cost its steps. What is trained is `bench.workload`,
the arithmetic is `bench.figures`; this module starts things, prints a table and draws the round times.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, figures, plans, results, runs, store_broker, workload
from bench.network import Kind, choose, network
from bench.paired import Paired, log_ratios, text
from bench.shapes import SHAPES
from parablock import config
from parablock.units import format_rate, parse_duration, parse_numbers, parse_rate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.figures import Averages
    from bench.workload import Workload

COST_BAR = 1.05
"""A round with a journal, or with encryption, may take so many times what one takes without."""

_BROKERS = {"journaled": ("bench.store_broker", "timed"), "bare": ("bench.store_broker", "nowhere")}
"""By kind of run: the broker's module, and what comes before its arguments, where that is not the broker itself."""

_COSTS = {"journal": ("journaled", "bare"), "encryption": ("encrypted", "plain")}
"""What may be left out, to see what it costs, and the kinds of run with it and without it."""

_GUESS_S = 0.5  # in which the calibration's link moves a block up and down

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    clients: tuple[int, ...]
    ratios: tuple[float, ...]
    """M over C; of no account where `rate` is given."""
    rate: float | None
    delay_s: float
    kind: Kind
    steps: int
    sweeps: int
    repeat: int
    predict: bool
    cost: str
    """What is also left out, of `_COSTS`; "": nothing."""
    overrides: tuple[str, ...]
    keep: Path | None
    """A new folder for the runs and their logs, in place of a temporary one."""
    out: Path | None
    shape: str | None = None
    """Of `bench.shapes`; None: the model of `bench.workload`."""
    dtype: str = "float32"


@dataclass(frozen=True)
class Bench:
    """A plan, what it trains, and the folder that its runs go to."""

    plan: Plan
    workload: Workload
    folder: Path

    def run(self, name: str, mode: str, clients: int, rate: float, sweeps: int, kind: str = "fedbcd") -> Averages:
        """One run of real processes. kind: see `_BROKERS` and `_COSTS`. Raises ChildError, LinkError, FiguresError and
        ConfigError."""
        rounds = figures.rounds_for(sweeps, self.workload.blocks)
        with network(self.plan.kind, [rate] * clients, self.plan.delay_s) as links:
            settings = self._settings(name, mode, rounds, clients, links.bind)
            broker = _BROKERS.get(kind, ("broker",))
            finished = runs.run(settings, links, self.folder / name, broker, plain=kind == "plain")
        return figures.averages(finished.read_metrics(), blocks=len(finished.manifest().blocks), clients=clients)

    def predict(self, name: str, clients: int, rate: float) -> list[dict[str, Any]]:
        """What `parablock plan` says of such a run, by client. Raises ChildError, LinkError, ConfigError."""
        with network(self.plan.kind, [rate] * clients, self.plan.delay_s) as links:
            settings = self._settings(name, "parablock", 1, clients, links.bind)
            return plans.plans(settings, links, self.folder / name)

    def _settings(self, name: str, mode: str, rounds: int, clients: int, bind: str) -> config.Config:
        settings = workload.settings(self.workload, mode, rounds, clients, self.plan.steps, bind)
        asked = self.folder / f"{name}.toml"
        asked.write_text(config.to_toml(settings), encoding="utf-8")
        return config.load(asked, self.plan.overrides)

    def rows(self, clients: int) -> list[dict[str, Any]]:
        """The result rows of one number of clients: one for each regime."""
        if self.plan.rate is not None:
            return [self._row(clients, self.plan.rate, None)]
        guess = 2 * self.workload.block_bytes / _GUESS_S
        measured = {}
        for turn, rate in enumerate((guess, 4 * guess) if self.plan.delay_s else (guess,)):
            _console.print(f"{_clients(clients)}: calibrating at {format_rate(rate)}")
            measured[rate] = self.run(f"{clients}-calibration-{turn}", "fedbcd", clients, rate, sweeps=1)
        return [self._row(clients, figures.rate_for(ratio, measured), ratio) for ratio in self.plan.ratios]

    def _row(self, clients: int, rate: float, ratio: float | None) -> dict[str, Any]:
        predicted = None
        if self.plan.predict:
            _console.print(f"{_clients(clients)}: planning at {format_rate(rate)}")
            predicted = self.predict(f"{clients}-{ratio or 'given'}-plan", clients, rate)
        found, without_s, stored = [], [], []
        whole, lacking = _COSTS.get(self.plan.cost, ("parablock", ""))
        for turn in range(self.plan.repeat):
            kinds = ["fedbcd", whole]
            if lacking:  # now the one and now the other first, so that what drifts is in neither's favour
                kinds = ["fedbcd", *((whole, lacking) if turn % 2 else (lacking, whole))]
            measured = {}
            for kind in kinds:
                mode = "fedbcd" if kind == "fedbcd" else "parablock"
                _console.print(f"{_clients(clients)}: {kind} at {format_rate(rate)}")
                name = f"{clients}-{ratio or 'given'}-{turn}-{kind}"
                measured[kind] = self.run(name, mode, clients, rate, self.plan.sweeps, kind)
                stored += self.stored_s(name) if kind == "journaled" else []
            found.append(row(clients, rate, ratio, measured["fedbcd"], measured[whole]))
            without_s += [measured[lacking].round_s] if lacking else []
        merged = figures.medians(found)
        tokens = self.plan.steps * workload.BATCH * self.workload.row_tokens
        merged["tokens_s"] = tokens / merged["parablock_compute_s"]
        if lacking:
            merged |= paired_cost(self.plan.cost, [each["parablock_round_s"] for each in found], without_s)
        if stored:
            merged |= {"store_p50_s": statistics.median(stored), "store_max_s": max(stored)}
        return merged if predicted is None else {**merged, **prediction(merged, predicted)}

    def stored_s(self, name: str) -> list[float]:
        """What each round of a journaled run took to become durable once its last chunk was folded, which is all that
        a journal can add where nothing hides it."""
        return store_broker.read_times(self.folder / name / "run")


def measure(plan: Plan, folder: Path) -> None:
    """All rows, printed and kept. folder: for the runs, unless they are to be kept elsewhere."""
    folder = plan.keep or folder
    made = workload.make(folder) if plan.shape is None else workload.of_shape(folder, SHAPES[plan.shape], plan.dtype)
    bench = Bench(plan, made, folder)
    rows = [row for clients in plan.clients for row in bench.rows(clients)]
    _console.print(table(rows))
    results.emit(result(rows, plan, made.block_bytes), plot(rows), plan.out)


def row(clients: int, rate: float, ratio: float | None, fedbcd: Averages, parablock: Averages) -> dict[str, Any]:
    """One row of the result. compute_s and comm_s are the fedbcd run's; all times are means over rounds."""
    return {
        "clients": clients,
        "regime": ratio,
        "rate_bytes_s": rate,
        "compute_s": fedbcd.compute_s,
        "comm_s": fedbcd.comm_s,
        "fedbcd_round_s": fedbcd.round_s,
        "parablock_round_s": parablock.round_s,
        "parablock_compute_s": parablock.compute_s,
        "parablock_comm_s": parablock.comm_s,
        "parablock_exposed_s": parablock.exposed_s,
        **dataclasses.asdict(figures.overlap(fedbcd, parablock)),
        "loop_lag_p99_ms": parablock.loop_lag_p99_ms,
        "rounds": parablock.rounds,
        "fedbcd_rounds_s": list(fedbcd.round_times_s),
        "parablock_rounds_s": list(parablock.round_times_s),
    }


def paired_cost(cost: str, with_s: Sequence[float], without_s: Sequence[float]) -> dict[str, Any]:
    """What one of `_COSTS` adds to parablock's round, from runs with it and without it, in pairs."""
    whole, lacking = _COSTS[cost]
    return {
        f"{whole}_rounds_s": list(with_s),
        f"{lacking}_rounds_s": list(without_s),
        cost: Paired(tuple(log_ratios(with_s, without_s))).told(math.log(COST_BAR)),
    }


def prediction(row: dict[str, Any], plans: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the plans say of the row's round times, and how far off they are. A round is as long as the slowest's."""
    found = {}
    for mode in ("fedbcd", "parablock"):
        planned_s = max(plan[f"{mode}_round_s"] for plan in plans)
        found[f"planned_{mode}_s"] = planned_s
        found[f"plan_error_{mode}_pct"] = 100 * (planned_s / row[f"{mode}_round_s"] - 1)
    found["planned_compute_s"] = max(plan["compute_s"] for plan in plans)
    found["planned_comm_s"] = max(plan["exchange_s"] for plan in plans)
    return found


def result(rows: list[dict[str, Any]], plan: Plan, block_bytes: int) -> dict[str, Any]:
    """The JSON object of design §6: the row nearest to M = C with the fewest clients, all rows, the conditions."""
    chosen = min(rows, key=lambda row: (row["clients"], abs((row["regime"] or 1.0) - 1.0)))
    return {
        "bench": "overlap",
        **results.headline(chosen),
        "rows": rows,
        "link": plan.kind,
        "delay_s": plan.delay_s,
        "steps": plan.steps,
        "shape": plan.shape,
        "dtype": plan.dtype,
        "block_bytes": block_bytes,
        "repeat": plan.repeat,
        "overrides": list(plan.overrides),
        "machine": results.machine(),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "clients": lambda row: str(row["clients"]),
        "Mbit/s": lambda row: f"{row['rate_bytes_s'] * 8e-6:.1f}",
        "C": lambda row: f"{row['compute_s']:.3f}",
        "M": lambda row: f"{row['comm_s']:.3f}",
        "fedbcd": lambda row: f"{row['fedbcd_round_s']:.3f}",
        "parablock": lambda row: f"{row['parablock_round_s']:.3f}",
        "efficiency": lambda row: f"{row['efficiency']:.3f}",
        "bound": lambda row: f"{row['bound_ratio']:.3f}",
        "slowdown": lambda row: f"{row['compute_slowdown']:.3f}",
        "tokens/s": lambda row: f"{row['tokens_s']:,.0f}",
        "lag ms": lambda row: "" if row["loop_lag_p99_ms"] is None else f"{row['loop_lag_p99_ms']:.1f}",
    }
    caption = "C, M (of the fedbcd run) and round times in seconds, means over rounds; tokens/s: of a client's compute"
    if all("planned_fedbcd_s" in row for row in rows):
        columns["plan %"] = lambda row: f"{row['plan_error_fedbcd_pct']:+.1f} {row['plan_error_parablock_pct']:+.1f}"
        caption += "; plan: how far off its round times were, fedbcd and parablock"
    for cost in _COSTS:
        if all(cost in row for row in rows):
            columns[f"{cost} %"] = lambda row, cost=cost: text(row[cost])  # type: ignore[misc]
            caption += f"; {cost}: what it adds to a round of parablock, and its 95 % interval"
    if all("store_p50_s" in row for row in rows):
        columns["store ms"] = lambda row: f"{1e3 * row['store_p50_s']:.1f}"
        caption += "; store: of it, until durable"
    return results.table(columns, rows, caption)


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Round times of both modes against max(C, M), one panel a row."""
    figure = Figure(figsize=(7, 2.6 * len(rows) + 0.6), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, each in zip(panels, rows, strict=True):
        bound = max(each["parablock_compute_s"], each["parablock_comm_s"])
        axes.plot(each["fedbcd_rounds_s"], color="tab:gray", marker="o", markersize=3, label="fedbcd")
        axes.plot(each["parablock_rounds_s"], color="tab:blue", marker="o", markersize=3, label="parablock")
        axes.axhline(bound, color="tab:red", linestyle="--", linewidth=1, label="max(C, M)")
        axes.set_ylim(bottom=0, top=1.25 * max(each["fedbcd_round_s"], each["parablock_round_s"], bound))
        axes.set_title(f"{_clients(each['clients'])}, {format_rate(each['rate_bytes_s'])}", fontsize=10)
        axes.set_ylabel("round time (s)")
        axes.legend(loc="lower right", ncols=3, fontsize=8)
    panels[-1].set_xlabel("round")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("overlap", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("overlap", __doc__, quick="one number of clients, one regime, few rounds")
    add = parser.add_argument
    add("--clients", help="numbers of clients, a row for each: 1,2 (default: cores less one)")
    add("--regime", default="1", help="M over C, a row for each: 0.5,1,2 (default: 1)")
    add("--rate", help="rate of each link instead, as 45mbit or 5MB/s")
    add("--delay", default="0", help="delay of each way, as 50ms (user-space link)")
    add("--link", choices=("auto", "kernel", "user"), default="auto", help="what shapes the links")
    add("--shape", choices=SHAPES, help="a model of this shape, with random weights, instead of the small one")
    add("--dtype", choices=("float32", "bfloat16"), help="of it (default: of a llama bfloat16, else float32)")
    add("--steps", type=int, help="optimizer steps a round, K (default: 2; quick: 1)")
    add("--sweeps", type=int, help="sweeps over all blocks that are measured (default: 5; quick: 2)")
    add("--repeat", type=int, default=1, help="pairs of runs, of which the medians are given (default: 1)")
    add("--plan", action="store_true", help="have `parablock plan` predict each row first, and say how far off it was")
    costs = parser.add_mutually_exclusive_group()
    for cost in _COSTS:
        told = f"run parablock without its {cost} as often, and say what that costs"
        costs.add_argument(f"--{cost}", dest="cost", action="store_const", const=cost, default="", help=told)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run; repeatable")
    add("--keep", type=Path, metavar="DIR", help="keep the runs' folders and logs in this new folder")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    clients = parse_numbers(options.clients, int, "--clients") if options.clients else (max(1, results.cores() - 1),)
    ratios = parse_numbers(options.regime, float, "--regime")
    steps = options.steps if options.steps is not None else (1 if options.quick else 2)
    sweeps = options.sweeps if options.sweeps is not None else (2 if options.quick else 5)
    for name, value in (("--steps", steps), ("--sweeps", sweeps), ("--repeat", options.repeat)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.quick and (len(clients) > 1 or len(ratios) > 1 or options.repeat > 1 or options.cost):
        raise ValueError(
            "--quick is one row within 60 s; leave it out for several clients, regimes or repetitions, or a cost"
        )
    delay_s = parse_duration(options.delay)
    if options.cost == "encryption" and options.link != "user":
        raise ValueError(
            "--encryption goes with --link user: unencrypted connections do not leave the machine's loopback"
        )
    if options.dtype and not options.shape:
        raise ValueError("--dtype is of a --shape; the small model is float32")
    kind, reason = choose(options.link, delay_s)
    _console.print(reason)
    config.load(None, options.set)  # a typing mistake is told now
    if options.keep is not None:
        try:
            options.keep.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {options.keep}: {error.strerror}; name a new one") from error
    return Plan(
        clients=clients,
        ratios=ratios,
        rate=parse_rate(options.rate) if options.rate else None,
        delay_s=delay_s,
        kind=kind,
        steps=steps,
        sweeps=sweeps,
        repeat=options.repeat,
        predict=options.plan,
        cost=options.cost,
        overrides=tuple(options.set),
        keep=options.keep,
        out=options.out,
        shape=options.shape,
        dtype=options.dtype or (SHAPES[options.shape].dtype if options.shape else "float32"),
    )


def _clients(count: int) -> str:
    return f"{count} client{'s' * (count != 1)}"


if __name__ == "__main__":
    sys.exit(main())
