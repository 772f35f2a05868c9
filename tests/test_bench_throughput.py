"""The throughput benchmark: its arithmetic on runs that are made up, its output, and one small measurement."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from bench import command, throughput
from bench.exchange import Client, Exchange, Finished
from bench.grid import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

ASKED = Exchange(clients=2, blocks=2, block_bytes=4_000_000, rounds=5, gated=True)
PLAN = throughput.Plan(Grid((4.0,), (2,), rounds=3, repeat=1), blocks=2, out=None, where=None)


def finished(longer: float = 1.0) -> Finished:
    """Rounds of 9, 9, 0.5, 0.5 and 1 s (the last three `longer`), of which the first two are the warm-up."""
    began = dict(enumerate((0.0, 10.0, 20.0, 30.0, 40.0)))
    first = Client("a", began, {round: at + 0.25 for round, at in began.items()})
    last = Client("b", began, dict(enumerate((9.0, 19.0, 20 + 0.5 * longer, 30 + 0.5 * longer, 40 + longer))))
    stored = [{"round": n, "began": 10.0 * n, "ended": 10.0 * n + 0.125, "cpu_s": 0.25 * n} for n in range(5)]
    return Finished((first, last), (2,) * 5, tuple(stored), broker_peak_bytes=20_000_000, client_peak_bytes=9_000_000)


def found_row() -> dict[str, Any]:
    return throughput.row(ASKED, finished(), finished(longer=2.0), raw_s=[0.25, 0.25, 0.5])


def test_a_row_from_a_run_by_hand() -> None:
    row = found_row()
    assert (row["workers"], row["block_mb"], row["rounds"]) == (2, 4.0, 3)
    # Two clients moved 4 MB each way, so 16 MB, in 0.5 s and in 0.25 s.
    assert (row["exchange_mb_s"], row["raw_zmq_mb_s"], row["ratio"]) == (32.0, 64.0, 0.5)
    assert (row["stored_mb_s"], row["stored_ratio"]) == (16.0, 0.25)
    assert (row["store_s"], row["broker_cpu_s"]) == (0.125, 0.25)
    # The model's two blocks, one a client, and three.
    assert (row["broker_peak_mb"], row["bound_mb"]) == (20.0, 28.0)
    assert (row["client_peak_mb"], row["client_bound_mb"]) == (9.0, 24.0)


def test_the_result_has_the_keys_of_the_contract_and_survives_json() -> None:
    better = {**found_row(), "ratio": 0.75, "workers": 8}
    found = json.loads(json.dumps(throughput.result([better, found_row()], PLAN), allow_nan=False))
    contract = {"exchange_mb_s", "raw_zmq_mb_s", "ratio", "broker_peak_mb", "bound_mb", "block_mb", "workers"}
    assert contract <= found.keys()
    assert contract <= found["rows"][0].keys()
    assert (found["ratio"], found["workers"]) == (0.5, 2)  # the worst row stands for all
    assert found["folder"]
    assert found["machine"]["cores"] >= 1


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    rows = [found_row(), {**found_row(), "block_mb": 16.0}, {**found_row(), "workers": 8}]
    with (tmp_path / "table").open("w") as file:
        console = Console(width=200, record=True, file=file)
        console.print(throughput.table(rows))
    assert console.export_text().count("0.500") == 3  # seconds of a round
    figure = throughput.plot(rows)
    assert [axes.get_title() for axes in figure.axes] == ["2 clients", "8 clients"]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_one_small_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "throughput.json"
    small = ["--block-mb", "0.1", "--clients", "2", "--rounds", "2", "--repeat", "1", "--out", str(out)]
    assert throughput.main(small) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert printed["exchange_mb_s"] > 0
    assert printed["raw_zmq_mb_s"] > 0
    assert len(printed["rows"][0]["rounds_s"]) == len(printed["rows"][0]["raw_rounds_s"]) == 2
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--block-mb", "big"], "--block-mb takes numbers above zero"),
        (["--block-mb", "0.0001"], "--block-mb takes sizes from 0.001"),
        (["--block-mb", "5000"], "to 4096 MB"),
        (["--clients", "0"], "--clients takes numbers above zero"),
        (["--clients", "1.5"], "--clients takes numbers above zero"),
        (["--blocks", "0"], "--blocks must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--quick", "--clients", "2,4"], "--quick is one row"),
        (["--out", "result.txt"], "end it in .json"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(arguments) == 2
    assert complaint in capsys.readouterr().err


# What the commands share --------------------------------------------------------------------------------------


def test_a_run_that_fails_is_exit_code_1_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    def fail(plan: str, folder: Path) -> None:
        seen.append(folder)
        raise OSError(f"no room for {plan}")

    monkeypatch.setattr(command, "SHM", tmp_path)
    assert command.run("thing", Namespace(out=None, shm=True), lambda *_: "the plan", fail) == 1
    assert "bench.thing failed: no room for the plan" in capsys.readouterr().err
    assert seen[0].parent == tmp_path
    assert not seen[0].exists()


def test_an_interrupt_is_exit_code_130() -> None:
    def interrupt(_plan: None, _folder: Path) -> None:
        raise KeyboardInterrupt

    assert command.run("thing", Namespace(out=None, shm=False), lambda *_: None, interrupt) == 130


def test_a_machine_without_a_file_system_in_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.shm(False) is None
    monkeypatch.setattr(command, "SHM", tmp_path / "shm")
    assert throughput.main(["--shm"]) == 2
    assert "leave --shm out" in capsys.readouterr().err
    (tmp_path / "shm").mkdir()
    assert command.shm(True) == tmp_path / "shm"


def test_out_is_checked_before_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*_: object) -> None:
        raise AssertionError("the plan was made")

    options = Namespace(out=Path("no/such/folder/r.json"), shm=False)
    assert command.run("thing", options, plan, lambda *_: None) == 2
    assert "make it first" in capsys.readouterr().err
