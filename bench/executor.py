"""Which settings of the torch executor cost least: `python -m bench.executor [--quick] [--out FILE.json]`.

For each number of torch threads and each switch interval of the interpreter, the built-in model trains in the worker's
own torch executor while the event loop beside it runs timers and moves chunks of 1 MiB through a socket pair, as a link
would. Measured are the time of an optimizer step and how late the loop runs its timers. The settings take turns, so
that a machine that changes its pace does not favour one of them. Nothing is learnt, and nothing leaves the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from bench import command, results
from parablock import models, sections
from parablock.batch import Batch
from parablock.blocks import partition
from parablock.solver import BlockSolver
from workers.__main__ import loop_factory
from workers.executor import SWITCH_INTERVAL_S, TorchExecutor

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

INTERVALS_S = (5e-3, 1e-3, 5e-4, 1e-4)
CHUNK_BYTES = 1 << 20
CHUNK_EVERY_S = 0.02  # at most 50 chunks a second, 0.4 Gbit/s
TIMER_EVERY_S = 0.005
ROWS, ROW_TOKENS, STEPS = 4, 128, 2

LAG_BAR_MS = 5.0
"""The event loop's p99 lag while training may be this much (issue 3)."""
NEAR = 1.02
"""Step times within this factor of the shortest are taken for equal."""

_console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for. seconds: of a turn. turns: of each setting."""

    threads: tuple[int, ...]
    seconds: float
    turns: int
    out: Path | None


@dataclass(frozen=True)
class Setting:
    threads: int
    switch_interval_s: float


class Load:
    """What a link does to the event loop while `run` is entered; `lags_s` and `chunks` tell how it fared."""

    def __init__(self) -> None:
        self.lags_s: list[float] = []
        self.chunks = 0

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        left, right = socket.socketpair()
        with left, right:
            left.setblocking(False)
            right.setblocking(False)
            tasks = [asyncio.create_task(job) for job in (self._send(left), self._receive(right), self._timers())]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if not isinstance(error, asyncio.CancelledError):
                raise RuntimeError("the load ended before the measurement") from error

    async def _send(self, end: socket.socket) -> None:
        chunk = bytes(CHUNK_BYTES)
        while True:
            await asyncio.get_running_loop().sock_sendall(end, chunk)
            await asyncio.sleep(CHUNK_EVERY_S)

    async def _receive(self, end: socket.socket) -> None:
        view = memoryview(bytearray(CHUNK_BYTES))
        while True:
            held = 0
            while held < CHUNK_BYTES:
                held += await asyncio.get_running_loop().sock_recv_into(end, view[held:])
            self.chunks += 1

    async def _timers(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TIMER_EVERY_S
            await asyncio.sleep(TIMER_EVERY_S)
            self.lags_s.append(max(loop.time() - due, 0.0))


class Training:
    """Rounds on the built-in model. Its calls run on the torch executor."""

    def __init__(self) -> None:
        models.quiet()
        loaded = models.load("builtin", dtype="float32", seed=0)
        manifest = partition(loaded.model, sections.Blocks())
        self._solver = BlockSolver(loaded.model, manifest, sections.Solver(), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 256, (ROWS, ROW_TOKENS), generator=generator)
        self._batches = [[Batch(ids, torch.ones_like(ids), ids)]] * STEPS

    def run(self, seconds: float) -> list[float]:
        """Train for so long; the mean step time of each round, in seconds. The first round warms up, uncounted."""
        self._round()
        ended, steps = time.monotonic() + seconds, [self._round()]
        while time.monotonic() < ended:
            steps.append(self._round())
        return steps

    def _round(self) -> float:
        began = time.monotonic()
        self._solver.train(0, self._batches, lr=1e-6)  # the block has its old values again afterwards
        return (time.monotonic() - began) / STEPS


async def turn(training: Training, setting: Setting, seconds: float, *, loaded: bool) -> dict[str, float]:
    """One turn of a setting. loaded: with a link beside it; without, only the step time is told."""
    executor = TorchExecutor(setting.threads, setting.switch_interval_s)
    load = Load()
    try:
        async with load.run() if loaded else contextlib.nullcontext():
            began = time.monotonic()
            steps = await executor(training.run, seconds)
            spent = time.monotonic() - began
    finally:
        executor.close()
    found = {"step_ms": 1e3 * statistics.median(steps)}
    if loaded:
        lags = sorted(load.lags_s)
        found["lag_p99_ms"] = 1e3 * lags[int(0.99 * (len(lags) - 1))]
        found["lag_max_ms"] = 1e3 * lags[-1]
        found["chunks_s"] = load.chunks / spent
    return found


async def rows(threads: Sequence[int], seconds: float, turns: int) -> list[dict[str, Any]]:
    """A row for each setting: medians over its turns, the maximum of the greatest lags."""
    training = Training()
    settings = [Setting(*pair) for pair in itertools.product(threads, INTERVALS_S)]
    alone: dict[int, list[float]] = {count: [] for count in threads}
    measured: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    for _ in range(turns):
        for count in threads:
            unloaded = await turn(training, Setting(count, SWITCH_INTERVAL_S), seconds, loaded=False)
            alone[count].append(unloaded["step_ms"])
        for setting in settings:
            measured[setting].append(await turn(training, setting, seconds, loaded=True))
    return [
        {
            "threads": setting.threads,
            "switch_interval_ms": 1e3 * setting.switch_interval_s,
            "step_ms": statistics.median(each["step_ms"] for each in taken),
            "step_alone_ms": statistics.median(alone[setting.threads]),
            "lag_p99_ms": statistics.median(each["lag_p99_ms"] for each in taken),
            "lag_max_ms": max(each["lag_max_ms"] for each in taken),
            "chunks_s": statistics.median(each["chunks_s"] for each in taken),
        }
        for setting, taken in measured.items()
    ]


def best(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The row to be used, and why: the shortest step of those whose lag is below the bar, of equals the least lag."""
    fitting = [row for row in rows if row["lag_p99_ms"] <= LAG_BAR_MS]
    if not fitting:
        return min(rows, key=lambda row: row["lag_p99_ms"]), f"the least lag; none is below {LAG_BAR_MS:g} ms"
    shortest = min(row["step_ms"] for row in fitting)
    equal = [row for row in fitting if row["step_ms"] <= NEAR * shortest]
    reason = f"of the settings with a p99 lag below {LAG_BAR_MS:g} ms and the shortest step (within 2 %), the least lag"
    return min(equal, key=lambda row: row["lag_p99_ms"]), reason


def table(rows: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> Table:
    shown = Table(box=box.SIMPLE, padding=(0, 1), caption="times in ms; alone: without a link beside it")
    columns = {
        "threads": "threads", "switch interval": "switch_interval_ms", "step": "step_ms", "alone": "step_alone_ms",
        "lag p99": "lag_p99_ms", "lag max": "lag_max_ms", "chunks/s": "chunks_s",
    }  # fmt: skip
    for heading in columns:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*(f"{row[key]:.4g}" for key in columns.values()), style="bold" if row is chosen else "")
    return shown


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Step time and lag by switch interval, a line for each number of threads."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    step, lag = figure.subplots(1, 2)
    for place, threads in enumerate(sorted({row["threads"] for row in rows})):
        own = [row for row in rows if row["threads"] == threads]
        intervals = [row["switch_interval_ms"] for row in own]
        style: dict[str, Any] = {"color": f"C{place}", "marker": "o"}
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        step.plot(intervals, [row["step_ms"] for row in own], label=name, **style)
        step.axhline(own[0]["step_alone_ms"], color=f"C{place}", linestyle=":", linewidth=1)
        lag.plot(intervals, [row["lag_p99_ms"] for row in own], label=f"{name}, p99", **style)
        lag.plot(intervals, [row["lag_max_ms"] for row in own], label=f"{name}, largest", linestyle="--", **style)
    lag.axhline(LAG_BAR_MS, color="tab:red", linewidth=1)
    for axes, quantity in ((step, "step time (ms); dotted: without a link"), (lag, "event-loop lag (ms)")):
        axes.set(xscale="log", xlabel="switch interval (ms)", ylabel=quantity)
        axes.set_ylim(0, 1.3 * axes.dataLim.y1)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def measure(plan: Plan, _folder: Path) -> None:
    """All rows, printed and kept."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        found = runner.run(rows(plan.threads, plan.seconds, plan.turns))
    chosen, reason = best(found)
    _console.print(table(found, chosen))
    _console.print(
        f"best: {chosen['threads']} threads, a switch interval of {chosen['switch_interval_ms']:g} ms ({reason})"
    )
    result = {
        "bench": "executor",
        **chosen,
        "reason": reason,
        "rows": found,
        "seconds": plan.seconds,
        "turns": plan.turns,
        "chunk_bytes": CHUNK_BYTES,
        "machine": results.machine(),
    }
    results.emit(result, plot(found), plan.out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit codes as in `bench.command`."""
    return command.run("executor", _parser().parse_args(argv), _plan, measure)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("executor", __doc__, quick="short turns")
    parser.add_argument("--seconds", type=float, help="of a turn (default: 4; quick: 0.8)")
    parser.add_argument("--turns", type=int, help="of each setting (default: 5; quick: 2)")
    return parser


def _plan(options: argparse.Namespace, _where: Path | None) -> Plan:
    """Raises ValueError, with what to do, for what cannot be run."""
    seconds = options.seconds if options.seconds is not None else (0.8 if options.quick else 4.0)
    turns = options.turns if options.turns is not None else (2 if options.quick else 5)
    if not 0 < seconds <= 600:
        raise ValueError(f"--seconds is above 0 and at most 600, got {seconds:g}")
    if turns < 1:
        raise ValueError(f"--turns must be at least 1, got {turns}")
    cores = results.cores()
    return Plan(tuple(sorted({1, max(cores - 1, 1), cores})), seconds, turns, options.out)


if __name__ == "__main__":
    sys.exit(main())
