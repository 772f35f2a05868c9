"""What one slow client costs the others: four clients over shaped links, the last one at a tenth of the rate.

A quorum of three and a short deadline let rounds close without it. The others' round time with it is set against the
round time with four equal links. Reached as `python -m bench.scale --slow-one`.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from bench import exchange, results
from bench.exchange import Exchange
from bench.network import network
from parablock.units import format_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from bench.exchange import Client, Finished
    from bench.network import Kind

CLIENTS = 4
SLOW_SHARE = 0.1
"""Of the others' rate, for the last client."""

WARM_UP_ROUNDS = 2
EXCHANGE_S = 0.8
PAUSE_S = 0.4
"""Of a round with equal links: a block's way up and down, and the rest in place of training."""

_console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """rate: bytes per second, of the other links. rounds: measured ones, after the warm-up."""

    rate: float
    kind: Kind
    deadline_s: float
    blocks: int
    block_bytes: int
    rounds: int


def block_bytes(rate: float) -> int:
    """A block that takes EXCHANGE_S up and down at `rate`, in whole float32 values."""
    return int(rate * EXCHANGE_S / 2) // 4 * 4


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """The figures of two runs: with four equal links, and with the last one slow."""
    asked = Exchange(
        CLIENTS,
        plan.blocks,
        plan.block_bytes,
        plan.rounds + WARM_UP_ROUNDS,
        quorum=CLIENTS - 1,
        deadline_s=plan.deadline_s,
        pause_s=PAUSE_S,
        excused=1,
    )
    runs = []
    for share in (1.0, SLOW_SHARE):
        rates = [plan.rate] * (CLIENTS - 1) + [plan.rate * share]
        _console.print(f"{CLIENTS} clients, the last one at {format_rate(rates[-1])}")
        with network(plan.kind, rates) as links, tempfile.TemporaryDirectory(dir=folder) as place:
            runs.append(exchange.run(asked, Path(place), links))
    return row(*runs)


def row(without: Finished, within: Finished) -> dict[str, Any]:
    """What a slow client costs the others. without: the run with equal links; within: the run with the slow one.

    fast_missed: how often one of the others was not counted in a round after the warm-up: its contribution came when
    the deadline had passed and three were in, one of them perhaps the slow one's.
    """
    others = [client.name for client in within.clients[: CLIENTS - 1]]
    missed_without, missed = (
        sum(name not in counted for counted in finished.contributors[WARM_UP_ROUNDS:] for name in others)
        for finished in (without, within)
    )
    before, after = (_periods_s(finished.clients[: CLIENTS - 1]) for finished in (without, within))
    before_s, after_s = statistics.median(before), statistics.median(after)
    return {
        "round_without_s": before_s,
        "round_s": after_s,
        "slow_ratio": after_s / before_s,
        "slow_counted": sum(not set(counted).issubset(others) for counted in within.contributors),
        "fast_missed_without": missed_without,
        "fast_missed": missed,
        "broker_cpu_s": within.broker_cpu_s(WARM_UP_ROUNDS),
        "broker_peak_mb": within.broker_peak_bytes / 1e6,
        "rounds": len(after),
        "rounds_without_s": before,
        "rounds_s": after,
    }


def result(found: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The part of the JSON object that is about the slow client: the figures and what they hold for."""
    return {
        "case": "slow one",
        "clients": CLIENTS,
        **found,
        "rate_bytes_s": plan.rate,
        "slow_share": SLOW_SHARE,
        "deadline_s": plan.deadline_s,
        "pause_s": PAUSE_S,
        "link": plan.kind,
    }


def table(found: dict[str, Any]) -> Table:
    """The figures for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "round s, equal links": lambda row: f"{row['round_without_s']:.3f}",
        " with a slow one": lambda row: f"{row['round_s']:.3f}",
        " ratio": lambda row: f"{row['slow_ratio']:.3f}",
        " rounds that counted it": lambda row: str(row["slow_counted"]),
        " others missed": lambda row: f"{row['fast_missed_without']}, {row['fast_missed']}",
    }
    return results.table(
        columns, [found], "round times of the three others, medians; missed: not counted in a round, without and with"
    )


def plot(found: dict[str, Any]) -> Figure:
    """The others' round times, with and without the slow client."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(found["rounds_without_s"], color="tab:gray", marker="o", markersize=3, label="four equal links")
    axes.plot(found["rounds_s"], color="tab:blue", marker="o", markersize=3, label="one at a tenth of the rate")
    axes.set(xlabel="round, of one client after the other", ylabel="round time of the others (s)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _periods_s(clients: Sequence[Client]) -> list[float]:
    """Seconds from one round's block to the next one's, of each client in turn, after the warm-up.

    The last round is left out: nobody trains after it, so that it is another kind of round.
    """
    found = []
    for client in clients:
        held = [client.held[round] for round in sorted(client.held) if round >= WARM_UP_ROUNDS - 1]
        found += [later - earlier for earlier, later in itertools.pairwise(held[:-1])]
    return found
