"""The throughput benchmark: its arithmetic on runs that are made up, its output, and one small measurement."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from bench import secure_cost, throughput
from bench.exchange import Client, Exchange, Finished
from bench.figures import FiguresError
from bench.grid import Grid
from tests.shown import shown

if TYPE_CHECKING:
    from pathlib import Path

ASKED = Exchange(clients=2, blocks=2, block_bytes=4_000_000, rounds=5, gated=True)
PLAN = throughput.Plan(Grid((4.0,), (2,), rounds=3, repeat=1), blocks=2, plain=False, secure=None, out=None, where=None)


def finished(longer: float = 1.0) -> Finished:
    """Rounds of 9, 9, 0.5, 0.5 and 1 s (the last three `longer`), of which the first two are the warm-up."""
    began = dict(enumerate((0.0, 10.0, 20.0, 30.0, 40.0)))
    first = Client("a", began, {round: at + 0.25 for round, at in began.items()})
    last = Client("b", began, dict(enumerate((9.0, 19.0, 20 + 0.5 * longer, 30 + 0.5 * longer, 40 + longer))))
    stored = [{"round": n, "began": 10.0 * n, "ended": 10.0 * n + 0.125, "cpu_s": 0.25 * n} for n in range(5)]
    return Finished((first, last), (("a", "b"),) * 5, tuple(stored), 20_000_000, 9_000_000)


def found_row() -> dict[str, Any]:
    fixed = dataclasses.replace(finished(), broker_peak_bytes=5_000_000, client_peak_bytes=4_000_000)
    return throughput.row(ASKED, finished(), finished(longer=2.0), fixed, raw_s=[0.25, 0.25, 0.5])


def test_a_row_from_a_run_by_hand() -> None:
    row = found_row()
    assert (row["workers"], row["block_mb"], row["rounds"]) == (2, 4.0, 3)
    # Two clients moved 4 MB each way, so 16 MB, in 0.5 s and in 0.25 s.
    assert (row["exchange_mb_s"], row["raw_zmq_mb_s"], row["ratio"]) == (32.0, 64.0, 0.5)
    assert (row["stored_mb_s"], row["stored_ratio"]) == (16.0, 0.25)
    assert (row["store_s"], row["broker_cpu_s"]) == (0.125, 0.25)
    # The model's two blocks, one a client, and three.
    assert (row["broker_peak_mb"], row["broker_fixed_mb"], row["bound_mb"]) == (20.0, 5.0, 28.0)
    assert (row["client_peak_mb"], row["client_fixed_mb"], row["client_bound_mb"]) == (9.0, 4.0, 24.0)


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
    assert shown(throughput.table(rows)).count("0.500") == 3  # seconds of a round
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


def test_what_masks_cost_is_told_in_pairs() -> None:
    asked = Exchange(clients=2, blocks=2, block_bytes=4_000_000, rounds=5, gated=True)
    found = secure_cost.row(asked, [(finished(), finished(longer=1.1))] * 2)
    assert (found["plain_s"], found["secure_s"]) == (0.5, pytest.approx(0.55))
    assert found["overhead"]["gap_pct"] == pytest.approx(10.0)
    assert found["overhead"]["verdict"] == "within"
    plan = secure_cost.Plan(Grid((4.0,), (2,), rounds=3, repeat=2), rate=1.25e7, kind="user")
    told = json.loads(json.dumps(secure_cost.result([found], plan), allow_nan=False))
    assert told["overhead"]["bar_pct"] == pytest.approx(15.0)
    assert "+10.00" in shown(secure_cost.table([found]))
    assert len(secure_cost.plot([found]).axes) == 1
    alone = dataclasses.replace(finished(), contributors=(("a",),) * 5)
    with pytest.raises(FiguresError, match="did not count every client"):
        secure_cost.row(asked, [(finished(), alone)])


def test_a_masked_exchange_over_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "secure.json"
    small = ["--secure", "--link", "user", "--block-mb", "0.1", "--clients", "3", "--rounds", "1", "--repeat", "1"]
    assert throughput.main([*small, "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert printed["secure_s"] > 0


def test_a_model_without_blocks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--blocks", "0"]) == 2
    assert "--blocks must be at least 1" in capsys.readouterr().err
