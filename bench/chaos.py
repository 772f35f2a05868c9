"""Whether anything is lost when processes are killed: a seeded plan of faults on real ones, every invariant checked.

    python -m bench.chaos --quick --out chaos.json
    python -m bench.chaos --kills 200 --seed 3
    python -m bench.chaos --workers real --kills 20

One broker and its workers are killed (SIGKILL) and started again, stopped and continued, cut off and stalled. Light
workers (`bench.light`) contribute what follows from their name and the round, so that the final blocks must equal, bit
for bit, a fold of what the journal says was counted; real ones train the built-in model. What must hold stands in
`bench.invariants`. A run in which it did not prints the line that replays its plan, and ends with exit code 1.

A kill ends a process and not the machine: what had reached the kernel is there afterwards, fsync or not. That nothing
is announced before it is on the disk itself is shown by the tests' failpoints, not here.
"""

from __future__ import annotations

import shlex
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from matplotlib.figure import Figure
from rich.console import Console

from bench import chaos_plan, chaos_run, command, recoveries, results, synthetic
from bench.chaos_plan import BROKER, Shape
from bench.chaos_run import Asked, Workers
from bench.figures import FiguresError
from parablock import config
from parablock.units import parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.chaos_run import Seen

BAR_S = 5.0
"""After a restart of the broker, clients are training again within this."""

LONGEST_S = 4.0
"""Of a stop or a stall: beyond `network.timeout_s` as it is set here, so that some are taken for gone."""

_NETWORK = {"chunk_bytes": 1 << 14, "timeout_s": 3.0, "heartbeat_s": 1.0, "resend_s": 1.5}

_MOST_TOLD = 20  # of the sentences that say what is wrong: one cause may break much

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    seed: int
    shape: Shape
    asked: Asked
    replay: str
    out: Path | None
    where: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """One run, printed and kept. Raises FiguresError with all that is wrong; then the run's folder stays somewhere."""
    kinds = Counter(fault.kind for fault in plan.asked.faults)
    _console.print(f"{', '.join(f'{number} × {kind}' for kind, number in kinds.items())}; {plan.replay}")
    seen = chaos_run.run(plan.asked, folder)
    if seen.wrong:
        kept = Path(tempfile.mkdtemp(prefix="parablock-chaos-failed-"))
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        told = [*seen.wrong[:_MOST_TOLD], *([f"and {more} more"] if (more := len(seen.wrong) - _MOST_TOLD) > 0 else [])]
        raise FiguresError("\n".join([*told, f"replay: {plan.replay}", f"what is left of it: {kept}"]))
    found = rows(seen)
    _console.print(table(found, seen))
    results.emit(result(found, seen, plan), plot(found), plan.out)


def rows(seen: Seen) -> list[dict[str, Any]]:
    """What coming back took: after the broker's restarts, and after the workers'."""
    workers = sum(kills for name, kills in seen.kills.items() if name != BROKER)
    return [
        row(BROKER, list(recoveries.of_broker(seen.acts, seen.lines)), seen.kills[BROKER]),
        row("worker", list(recoveries.of_clients(seen.acts, seen.lines)), workers),
    ]


def row(who: str, found: Sequence[recoveries.Recovery], kills: int) -> dict[str, Any]:
    """What coming back took, after the restarts of one kind of process; None where no restart is a measure."""
    session, training = [each.session_s for each in found], [each.training_s for each in found]
    return {
        "killed": who,
        "kills": kills,
        "measured": len(found),
        **_middle_and_end("session", session),
        **_middle_and_end("training", training),
        "training_s": training,
    }


def _middle_and_end(name: str, times: Sequence[float]) -> dict[str, float | None]:
    p50 = statistics.median(times) if times else None
    return {f"{name}_p50_s": p50, f"{name}_max_s": max(times, default=None)}


def result(rows: Sequence[dict[str, Any]], seen: Seen, plan: Plan) -> dict[str, Any]:
    """The JSON object: the broker's row, what was done, what was checked, the conditions."""
    acts = Counter(act.kind for act in seen.acts)
    return {
        "bench": "chaos",
        **results.headline(rows[0]),
        "kills": acts["kill"],
        "broker_kills": seen.kills[BROKER],
        "stops": acts["stop"],
        "cuts": acts["cut"],
        "stalls": acts["stall"],
        "bar_s": BAR_S,
        "within_bar": rows[0]["measured"] > 0 and rows[0]["training_max_s"] <= BAR_S,
        **_middle_and_end("listening", seen.listening_s),
        "rounds": len(seen.entries),
        "rounds_by_contributors": dict(sorted(Counter(str(len(each.contributors)) for each in seen.entries).items())),
        "epochs": len(seen.epochs),
        "rows_missing": seen.rows_missing,
        "commits_heard": sum(line.what == "commit" for lines in seen.lines.values() for line in lines),
        "verified": seen.verified,
        "seconds": seen.seconds,
        "rows": list(rows),
        "workers": plan.asked.workers,
        "clients": len(plan.asked.clients),
        "seed": plan.seed,
        "replay": plan.replay,
        "network": {key: getattr(plan.asked.config.network, key) for key in _NETWORK},
        "blocks": plan.asked.blocks,
        "block_bytes": plan.asked.block_bytes,
        **results.conditions(1, plan.where),
    }


def table(rows: Sequence[dict[str, Any]], seen: Seen) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "killed": lambda row: row["killed"],
        " times": lambda row: str(row["kills"]),
        " measured": lambda row: str(row["measured"]),
        " in session p50": lambda row: _seconds(row["session_p50_s"]),
        " max": lambda row: _seconds(row["session_max_s"]),
        " trained p50": lambda row: _seconds(row["training_p50_s"]),
        " max ": lambda row: _seconds(row["training_max_s"]),
    }
    caption = (
        f"seconds from the process's start to each client that nothing else disturbed; {len(seen.entries)} rounds in "
        f"{seen.seconds:.0f} s, every invariant held"
    )
    return results.table(columns, rows, caption)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """The share of clients that trained again, by time since the restart."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for each, color in zip(rows, ("tab:blue", "tab:gray"), strict=True):
        times = sorted(each["training_s"])
        shares = [(place + 1) / len(times) for place in range(len(times))]
        axes.step(times, shares, where="post", color=color, label=f"{each['killed']} killed, {len(times)} measured")
    axes.axvline(BAR_S, color="tab:red", linestyle="--", linewidth=1, label="bar")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("seconds from the process's start to trained again")
    axes.set_ylabel("share of clients")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("chaos", parser().parse_args(argv), plan_of, measure)


def parser() -> argparse.ArgumentParser:
    made = command.parser("chaos", __doc__, quick="8 kills of light workers")
    add = made.add_argument
    add("--seed", type=int, default=0, help="of the plan: who suffers what and when (default: 0)")
    add("--kills", type=int, help="SIGKILLs, with half as many other faults among them (default: 200; quick: 8)")
    add("--workers", choices=get_args(Workers), default="light", help="real ones train the built-in model")
    add("--clients", type=int, help="workers, of which every other one has a link to cut (default: light 4, real 2)")
    add("--spacing", type=int, help="rounds between two faults, on the average (default: light 15, real 3)")
    add("--block", default="64KiB", help="size of a light worker's block (default: 64KiB)")
    add("--blocks", type=int, default=4, help="blocks of a light worker's model (default: 4)")
    add("--pause-s", type=float, default=0.03, help="a light worker's rest in place of training (default: 0.03)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run; repeatable")
    command.add_shm(made)
    return made


def plan_of(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    light = options.workers == "light"
    kills = options.kills if options.kills is not None else (8 if options.quick else 200)
    count = options.clients if options.clients is not None else (4 if light else 2)
    spacing = options.spacing if options.spacing is not None else (15 if light else 3)
    for name, value in (("--kills", kills), ("--spacing", spacing), ("--blocks", options.blocks)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 2 <= count <= 16:
        raise ValueError(f"--clients is from 2 to 16, as many processes as that; got {count}")
    if options.quick and (kills > 8 or not light):
        raise ValueError("--quick ends within 60 s; leave it out for more than 8 kills or for real workers")
    block_bytes = parse_size(options.block)
    if block_bytes % 4 or not 4 <= block_bytes <= 1 << 30:
        raise ValueError(f"--block is a multiple of 4 bytes up to 1GiB, got {options.block}")
    if not 0 <= options.pause_s <= 10:
        raise ValueError(f"--pause-s is from 0 to 10 seconds, got {options.pause_s:g}")
    clients = tuple(f"{'light' if light else 'worker'}-{index:04d}" for index in range(count))
    shape = Shape(kills, clients, clients[::2], spacing, LONGEST_S)
    faults = chaos_plan.plan(options.seed, shape)
    asked = Asked(
        faults=faults,
        config=_settings(options, count, chaos_plan.rounds(faults)),
        clients=clients,
        linked=shape.linked,
        workers=options.workers,
        blocks=options.blocks,
        block_bytes=block_bytes,
        pause_s=options.pause_s,
    )
    return Plan(options.seed, shape, asked, _replay(options, kills, count, spacing), options.out, where)


def _settings(options: argparse.Namespace, clients: int, rounds: int) -> config.Config:
    """Rounds that close without one or the other, a server optimizer that has a state, an order that has one."""
    tree: dict[str, Any] = {
        "mode": "parablock",
        "rounds": rounds,
        "round": {"clients": clients, "quorum": (clients + 1) // 2, "deadline_s": 0.3},
        "server": {"optimizer": "momentum"},
        "schedule": {"order": "importance"},
        "solver": {"adaptive": True, "steps": 1, "min_steps": 1, "max_steps": synthetic.MOST_STEPS},
        "network": _NETWORK,
    }
    if options.workers == "real":
        tree["solver"] = {"steps": 1, "batch_size": 2, "lr": 0.003}
        # One that is still importing torch shall not find that the others have come to the end.
        tree["round"]["quorum"] = clients
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(config.to_toml(config.from_dict(tree)), encoding="utf-8")
        found = config.load(path, options.set)
    if options.workers == "light" and not found.codec.up == found.codec.down == "float32":
        raise ValueError(
            "light workers are checked bit for bit in float32; leave the codecs out, or take --workers real"
        )
    return found


def _replay(options: argparse.Namespace, kills: int, clients: int, spacing: int) -> str:
    words = ["python", "-m", "bench.chaos", "--seed", str(options.seed), "--kills", str(kills)]
    words += ["--clients", str(clients), "--spacing", str(spacing), "--workers", options.workers]
    if options.workers == "light":
        words += ["--block", options.block, "--blocks", str(options.blocks), "--pause-s", f"{options.pause_s:g}"]
    for each in options.set:
        words += ["--set", each]
    return shlex.join(words + ["--shm"] * options.shm)


if __name__ == "__main__":
    sys.exit(main())
