"""The executor's benchmark: which setting it calls best, and that it measures what it says."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench import executor
from bench.executor import INTERVALS_S, Load, best

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """They are the whole process's."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def row(step_ms: float, lag_p99_ms: float) -> dict[str, Any]:
    return {"step_ms": step_ms, "lag_p99_ms": lag_p99_ms}


def test_the_best_is_the_shortest_step_below_the_bar_and_of_equals_the_least_lag() -> None:
    fast_but_late, equal, shortest, slow = row(5, 5.1), row(10.1, 1.0), row(10, 4.9), row(11, 0.1)
    assert best([fast_but_late, equal, shortest, slow])[0] is equal
    assert best([fast_but_late, shortest, slow])[0] is shortest
    chosen, reason = best([row(5, 9), fast_but_late])
    assert chosen is fast_but_late
    assert "none is below 5 ms" in reason


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        for _ in itertools.takewhile(lambda _: not condition(), itertools.count()):
            await asyncio.sleep(0)


def test_the_load_moves_chunks_and_sees_how_late_the_loop_is() -> None:
    async def watch() -> Load:
        load = Load()
        async with load.run():
            await until(lambda: load.chunks >= 2 and len(load.lags_s) >= 3)
            seen = len(load.lags_s)
            began = time.monotonic()
            while time.monotonic() < began + 0.1:  # the loop is held up by this
                pass
            await until(lambda: len(load.lags_s) > seen)
        return load

    assert max(asyncio.run(watch()).lags_s) > 0.09


@pytest.mark.slow
def test_every_setting_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert executor.main(["--quick", "--seconds", "0.05", "--turns", "1", "--out", str(out)]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert out.with_suffix(".png").stat().st_size > 1000
    settings = {(row["threads"], row["switch_interval_ms"]) for row in result["rows"]}
    assert {interval for _, interval in settings} == {1e3 * interval for interval in INTERVALS_S}
    assert len(settings) == len(result["rows"]) >= len(INTERVALS_S)
    assert {result["threads"], 1} <= {threads for threads, _ in settings}
    for row in result["rows"]:
        assert 0 < row["lag_p99_ms"] <= row["lag_max_ms"]
        assert row["step_ms"] > 0
        assert row["step_alone_ms"] > 0
    assert "best: " in told.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seconds", "0"], "--seconds is above 0"),
        (["--seconds", "nan"], "--seconds is above 0"),
        (["--turns", "0"], "--turns must be at least 1, got 0"),
    ],
)
def test_bad_input_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert executor.main(arguments) == 2
    assert told in capsys.readouterr().err
