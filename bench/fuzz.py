"""Hostile input: malformed messages at the decoder, and a live broker under attack (faults.md, threats).

    python -m bench.fuzz --quick --out fuzz.json
    python -m bench.fuzz --decoder 1000000 --live 20000

The decoder may answer with WireError and nothing else, soon and in little memory. The broker is attacked twice, half
of the messages each: over CURVE with keys that are on its list, with others and with none; and over plain loopback,
where nobody can be barred. It must not end, hang or grow, and honest clients' rounds take as long as without, within
10 %. Everything follows from --seed but the timing.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import command, fuzz_decoder, fuzz_live, results
from bench.fuzz_live import Attack

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from rich.table import Table

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. decoder, live: messages; 0: not at all. rate: at the broker, a second."""

    decoder: int
    live: int
    rate: float
    seed: int
    out: Path | None
    where: Path | None


def measure(plan: Plan, folder: Path) -> None:
    """All of it, printed and kept."""
    decoder = None
    if plan.decoder:
        _console.print(f"{plan.decoder:,} messages at the decoder")
        decoder = fuzz_decoder.run(plan.decoder, plan.seed)
        _console.print(
            f"{decoder['refused']:,} refused, {decoder['taken']:,} taken, {decoder['mean_us']:.0f} µs each, slowest "
            f"{decoder['slowest_ms']:.1f} ms; one needed {decoder['most_kib_of_one']:.0f} KiB at most"
        )
    rows = [_row(plan, folder, plain=plain) for plain in (False, True)] if plan.live else []
    if rows:
        _console.print(table(rows))
    results.emit(result(decoder, rows, plan), plot(rows), plan.out)


def _row(plan: Plan, folder: Path, *, plain: bool) -> dict[str, Any]:
    attack = Attack(plan.live // 2, plan.rate, plain, plan.seed)
    _console.print(
        f"{attack.count:,} messages at a broker, {'plain' if plain else 'over CURVE'}, {attack.rounds} rounds"
    )
    with tempfile.TemporaryDirectory(dir=folder) as quiet, tempfile.TemporaryDirectory(dir=folder) as place:
        return fuzz_live.run(attack, Path(place), fuzz_live.quiet_peak_bytes(Path(quiet), plain=plain))


def result(decoder: dict[str, Any] | None, rows: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """What is kept."""
    return {
        "bench": "fuzz",
        "decoder": decoder,
        "live": list(rows),
        "seed": plan.seed,
        **results.conditions(1, plan.where),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "way": lambda row: row["way"],
        "messages": lambda row: f"{row['messages']:,}",
        "dropped": lambda row: str(row["dropped"]),
        "round s": lambda row: f"{row['quiet_round_s']:.3f}",
        "attacked": lambda row: f"{row['round_s']:.3f}",
        "% more": lambda row: f"{row['gap_pct']:+.1f}",
        "pairs": lambda row: str(row["pairs"]),
        "MB more": lambda row: f"{row['broker_more_mb']:.0f}",
    }
    return results.table(columns, rows, "turns with and without the attack, in pairs; the broker's memory: its peak")


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Round times of the turns, with and without the attack."""
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    for axes, row in zip(figure.subplots(1, max(len(rows), 1), squeeze=False)[0], rows, strict=False):
        axes.plot(row["quiet_s"], marker="o", color="tab:gray", label="without")
        axes.plot(row["under_s"], marker="o", color="tab:red", label="under attack")
        axes.set_title(f"{row['way']}: {row['messages']:,} messages", fontsize=9)
        axes.set_xlabel("turn")
        axes.set_ylabel("seconds a round")
        axes.set_ylim(0, 1.3 * max(*row["quiet_s"], *row["under_s"]))
        axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    parser = command.parser("fuzz", __doc__, quick="20,000 messages at the decoder, 2,000 at brokers")
    add = parser.add_argument
    add("--decoder", type=int, help="messages at the decoder; 0: none (default: 1000000; quick: 20000)")
    add("--live", type=int, help="messages at the brokers, both together; 0: none (default: 20000; quick: 2000)")
    add("--rate", type=float, default=400.0, help="messages a second at a broker, while it is attacked (default: 400)")
    add("--seed", type=int, default=0, help="of all that is made up (default: 0)")
    command.add_shm(parser)
    return command.run("fuzz", parser.parse_args(argv), _plan, measure)


def _plan(options: argparse.Namespace, where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    decoder = options.decoder if options.decoder is not None else (20_000 if options.quick else 1_000_000)
    live = options.live if options.live is not None else (2_000 if options.quick else 20_000)
    if decoder < 0 or live < 0 or not decoder + live:
        raise ValueError(f"--decoder and --live are numbers of messages, not both 0; got {decoder} and {live}")
    if not 1 <= options.rate <= 1e5:
        raise ValueError(f"--rate is from 1 to 100000 messages a second, got {options.rate:g}")
    return Plan(decoder, live, options.rate, options.seed, options.out, where)


if __name__ == "__main__":
    sys.exit(main())
