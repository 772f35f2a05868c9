"""The soak: its arithmetic on what is made up, and one small run of real processes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from bench import soak, usage
from bench.figures import FiguresError
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PLAN = soak.Plan(clients=2, blocks=2, block_bytes=4096, rounds=100, warm_up=50, out=None, where=None)


def watched(resident: Callable[[int], float] = lambda _: 50e6, files: Callable[[int], int] = lambda _: 20):
    """What a watch wrote over 100 rounds."""
    return [
        {"round": n, "resident_bytes": int(resident(n)), "objects": 1000, "files": files(n), "threads": 8, "tasks": 2}
        for n in range(100)
    ]


def test_the_slope_of_a_line_has_no_noise() -> None:
    found = soak.slope(range(50, 150), [3.0 * n + 7 for n in range(50, 150)])
    assert found.mean == pytest.approx(3.0)
    assert found.error == pytest.approx(0.0, abs=1e-6)


def test_the_noise_of_a_slope_covers_what_is_not_there() -> None:
    wavering = [1000.0 * (n // 10 % 2) for n in range(100)]
    found = soak.slope(range(100), wavering)
    assert abs(found.mean) < found.error


def test_what_stays_as_it_is_does_not_grow() -> None:
    row = soak.row("broker", watched(), 50)
    assert row["grows"] == []
    assert (row["resident_at_mb"], row["resident_max_mb"], row["files_at"], row["files_max"]) == (50.0, 50.0, 20, 20)


@pytest.mark.parametrize(
    ("rows", "grows"),
    [
        (watched(resident=lambda n: 50e6 + 5000 * n), ["resident"]),
        (watched(files=lambda n: 20 + (n > 60)), ["files"]),
        (watched(resident=lambda n: 50e6 + 1000 * n), []),  # the free lists
        (watched(resident=lambda n: 50e6 + 1e6 * min(n, 40), files=lambda n: 20 + (n == 3)), []),  # the warm-up
    ],
)
def test_a_leak_is_found_and_the_warm_up_is_none(rows: Sequence[dict[str, int]], grows: list[str]) -> None:
    assert soak.row("broker", rows, 50)["grows"] == grows


def test_too_few_rounds_are_told() -> None:
    with pytest.raises(FiguresError, match="50 times before round 50 and 5 later"):
        soak.row("broker", watched()[:55], 50)


def test_the_result_names_what_grew_and_survives_json(tmp_path: Path) -> None:
    rows = [soak.row("broker", watched(), 50), soak.row("clients-0", watched(files=lambda n: n), 50)]
    told = json.loads(json.dumps(soak.result(rows, PLAN), allow_nan=False))
    assert told["grows"] == ["clients-0: files"]
    assert len(told["rows"]) == 2
    assert "49 → 99" in shown(soak.table(rows, PLAN))
    soak.plot(rows, 50).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_watch_counts_files_and_tasks(tmp_path: Path) -> None:
    async def look() -> None:
        watch = usage.Watch(tmp_path / "watch")
        watch.look(0)
        task = asyncio.create_task(asyncio.Event().wait())
        with (tmp_path / "more").open("wb"):
            watch.look(1)
        task.cancel()
        watch.look(2)
        watch.close()

    asyncio.run(look())
    before, more, after = soak.read(tmp_path / "watch")
    assert more["files"] == before["files"] + 1 == after["files"] + 1
    assert more["tasks"] == before["tasks"] + 1
    assert before["resident_bytes"] > 1e6


def test_one_small_run_holds_what_it_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    small = ["--clients", "1", "--block", "4KiB", "--rounds", "40", "--warm-up", "15"]
    assert soak.main([*small, "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads(out.read_text())
    assert [row["process"] for row in told["rows"]] == ["broker", "clients-0"]
    assert not any(what.endswith(("files", "threads", "tasks")) for what in told["grows"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--clients", "0"], "--clients must be at least 1"),
        (["--rounds", "55"], "--rounds must exceed --warm-up by at least 10"),
        (["--block", "7"], "--block is a multiple of 4 bytes"),
        (["--quick", "--clients", "16"], "--quick ends within 60 s"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(arguments) == 2
    assert complaint in capsys.readouterr().err
