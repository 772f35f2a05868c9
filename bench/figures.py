"""The arithmetic of overlap: from the rows of metrics.jsonl to C, M, T, efficiency and bound_ratio (design §6).

Plain functions on dictionaries and numbers; the rows are read, and the runs made, elsewhere.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WARM_UP_ROUNDS = 2
TAIL_ROUNDS = 1
"""The last round of a pipelined run has nothing left to hide its exchange behind."""


class FiguresError(ValueError):
    """The rows cannot give the figures: too few rounds, or rounds that miss somebody."""


@dataclass(frozen=True)
class Averages:
    """Means over the measured rounds of one run, in seconds unless named otherwise."""

    rounds: int
    compute_s: float
    """C: the slowest client's compute."""
    comm_s: float
    """M: from the last delta ready to the block landed everywhere."""
    exposed_s: float
    round_s: float
    """T."""
    loop_lag_p99_ms: float | None
    """The worst client's 99th percentile in each round; None where no row has one."""
    round_times_s: tuple[float, ...]


@dataclass(frozen=True)
class Overlap:
    """How much of the exchange was hidden."""

    efficiency: float
    """(T_fedbcd − T_parablock) / min(C, M) with C and M of the fedbcd run: 1 is all that could be gained."""
    bound_ratio: float
    """T_parablock / max(C, M) with C and M of the parablock run: 1 is perfect where M <= C. Where M > C it may be
    less: on a full-duplex link one block goes up while the one before it still comes down, so that a client that is
    one round ahead needs only (C + M) / 2 a round."""
    compute_slowdown: float
    """C of the parablock run over C of the fedbcd run."""


def rounds_for(sweeps: int, blocks: int) -> int:
    """Rounds of a run of which `averages` measures `sweeps` sweeps over `blocks` blocks."""
    return WARM_UP_ROUNDS + sweeps * blocks + TAIL_ROUNDS


def averages(rows: Sequence[Mapping[str, Any]], *, blocks: int, clients: int) -> Averages:
    """Means over whole sweeps, after the warm-up and without the tail.

    rows: of metrics.jsonl; those of another kind than "round" are passed over. Whole sweeps, because a lower
    block costs more compute: its backward pass goes deeper. Raises FiguresError for fewer rounds than one sweep
    takes, and for a measured round that a client missed.
    """
    rounds = [row for row in rows if row["kind"] == "round"]
    sweeps = (len(rounds) - WARM_UP_ROUNDS - TAIL_ROUNDS) // blocks
    if sweeps < 1:
        raise FiguresError(
            f"one sweep over {blocks} blocks needs {rounds_for(1, blocks)} rounds with warm-up and tail; "
            f"the run has {len(rounds)}"
        )
    measured = rounds[WARM_UP_ROUNDS : WARM_UP_ROUNDS + sweeps * blocks]
    for row in measured:
        if len(row["contributors"]) != clients:
            raise FiguresError(
                f"round {row['round']} counted {len(row['contributors'])} of {clients} clients, so that it "
                "would compare different work; was the machine too busy? Run it again; --keep keeps the logs"
            )
        missing = [key for key in ("compute_s", "comm_s", "exposed_s", "round_s") if row[key] is None]
        if missing:
            raise FiguresError(f"round {row['round']} has no {', '.join(missing)}: no client reported on it")
    lags = [row["loop_lag_p99_ms"] for row in measured if row.get("loop_lag_p99_ms") is not None]
    return Averages(
        rounds=len(measured),
        compute_s=statistics.fmean(row["compute_s"] for row in measured),
        comm_s=statistics.fmean(row["comm_s"] for row in measured),
        exposed_s=statistics.fmean(row["exposed_s"] for row in measured),
        round_s=statistics.fmean(row["round_s"] for row in measured),
        loop_lag_p99_ms=statistics.fmean(lags) if lags else None,
        round_times_s=tuple(row["round_s"] for row in rounds),
    )


def overlap(fedbcd: Averages, parablock: Averages) -> Overlap:
    """The three ratios of design §6 from a pair of runs over the same link."""
    return Overlap(
        efficiency=(fedbcd.round_s - parablock.round_s) / min(fedbcd.compute_s, fedbcd.comm_s),
        bound_ratio=parablock.round_s / max(parablock.compute_s, parablock.comm_s),
        compute_slowdown=parablock.compute_s / fedbcd.compute_s,
    )


def rate_for(ratio: float, measured: Mapping[float, Averages]) -> float:
    """The rate (bytes per second) at which M should be `ratio` times C.

    measured: synchronous runs by the rate of their links, one or two. M is taken to be moving / rate, whatever bytes
    that moves; from two runs also a fixed part, which is what delays add and no rate shortens. Raises FiguresError
    where the fixed part alone is longer than asked, or M did not fall with the rate.
    """
    compute_s = statistics.fmean(run.compute_s for run in measured.values())
    slow, fast = min(measured), max(measured)
    if slow == fast:
        fixed_s, moving_bytes = 0.0, measured[slow].comm_s * slow
    else:
        moving_bytes = (measured[slow].comm_s - measured[fast].comm_s) / (1 / slow - 1 / fast)
        fixed_s = measured[slow].comm_s - moving_bytes / slow
    if moving_bytes <= 0:
        raise FiguresError(
            "the exchange was no shorter over a faster link; the machine is too busy to measure, run it again, "
            "or give a --rate"
        )
    if ratio * compute_s <= fixed_s:
        raise FiguresError(
            f"no rate makes the exchange {ratio:g} times the {compute_s:.3g} s of compute: {fixed_s:.3g} s of it do "
            "not depend on the rate; take a shorter delay or more steps"
        )
    return moving_bytes / (ratio * compute_s - fixed_s)


def medians(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row from repetitions: the median of each number, the last repetition's value of anything else."""
    merged = dict(rows[-1])
    for key, value in merged.items():
        if isinstance(value, float):
            found = [row[key] for row in rows if isinstance(row[key], float) and math.isfinite(row[key])]
            merged[key] = statistics.median(found)
    return merged
