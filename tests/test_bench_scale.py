"""The scale benchmark: its arithmetic on runs that are made up, its output, and small measurements of both kinds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from bench import exchange, scale, slow_client
from bench.exchange import Client, Exchange, Finished
from bench.figures import FiguresError
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ASKED = Exchange(clients=4, blocks=2, block_bytes=65536, rounds=5, processes=2)
PLAN = scale.Plan(
    clients=(4,), processes=2, blocks=2, block_bytes=65536, rounds=3, repeat=1, slow=None, out=None, where=None
)  # fmt: skip
SLOW = slow_client.Plan(rate=1e7, kind="user", deadline_s=0.05, blocks=2, block_bytes=65536, rounds=3)


def finished(ends: Sequence[float], contributors: Sequence[str], clients: str = "abcd") -> Finished:
    """All clients hold round r's block at ends[r]; the broker needs 0.25 s of CPU a round and 0.125 s to store.

    A letter is a client's name. contributors: by round.
    """
    held = dict(enumerate(ends))
    stored = [{"round": n, "began": float(n), "ended": n + 0.125, "cpu_s": 0.25 * n} for n in range(len(ends))]
    everybody = tuple(Client(name, {}, held) for name in clients)
    return Finished(everybody, tuple(tuple(names) for names in contributors), tuple(stored), 8_000_000, 2_000_000)


def found_row(clients: int = 4) -> dict[str, Any]:
    asked = dataclasses.replace(ASKED, clients=clients)
    names = "abcdefgh"[:clients]
    return scale.row(asked, finished((9.0, 10.0, 10.5, 11.5, 12.0), (names,) * 5, names))


def test_a_row_from_a_run_by_hand() -> None:
    row = found_row()
    assert row["rounds_s"] == [0.5, 1.0, 0.5]  # rounds 2 to 4
    assert (row["clients"], row["round_s"], row["rounds"]) == (4, 0.5, 3)
    assert (row["broker_cpu_s"], row["broker_cpu_ms_per_client"]) == (0.25, 62.5)
    assert (row["broker_peak_mb"], row["store_s"]) == (8.0, 0.125)


@pytest.mark.parametrize(
    ("contributors", "complaint"),
    [(("abcd", "abcd", "abc", "abcd", "abcd"), "round 2 counted 3 of 4 clients"), (("abcd",) * 4, "4 of 5 rounds")],
)
def test_a_round_that_misses_somebody_fails(contributors: Sequence[str], complaint: str) -> None:
    with pytest.raises(FiguresError, match=complaint):
        scale.row(ASKED, finished((9.0, 10.0, 10.5, 11.5, 12.0), contributors))


def test_the_result_has_the_keys_of_the_contract_and_survives_json() -> None:
    rows = [found_row(4), found_row(8)]
    found = json.loads(json.dumps(scale.result(rows, PLAN), allow_nan=False))
    contract = {"clients", "round_s", "broker_cpu_s", "broker_cpu_ms_per_client", "broker_peak_mb"}
    assert contract <= found.keys()
    assert contract <= found["rows"][0].keys()
    assert (found["clients"], len(found["rows"])) == (8, 2)
    assert found["cpu_growth"] == 0.5  # the same CPU for twice the clients
    assert found["machine"]["cores"] >= 1


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    rows = [found_row(4), found_row(8)]
    assert shown(scale.table(rows)).count("0.500") == 2
    assert len(scale.plot(rows).axes) == 2
    scale.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# One slow client ----------------------------------------------------------------------------------------------


EQUAL = finished((9.0, 10.0, 11.0, 12.0, 13.0, 20.0), ("abcd",) * 6)
WITH_A_SLOW_ONE = finished((9.0, 10.0, 11.1, 12.2, 13.3, 14.0), ("bcd", *("abc",) * 5), clients="abc")


def test_the_cost_of_a_slow_one_is_on_the_others() -> None:
    found = slow_client.row(EQUAL, WITH_A_SLOW_ONE)
    assert found["rounds_without_s"] == [1.0, 1.0, 1.0] * 3  # of three clients, without warm-up and last round
    assert found["slow_ratio"] == pytest.approx(1.1)
    assert found["slow_counted"] == 1
    assert (found["broker_cpu_s"], found["broker_peak_mb"]) == (0.25, 8.0)
    told = json.loads(json.dumps(slow_client.result(found, SLOW), allow_nan=False))
    contract = {"clients", "round_s", "broker_cpu_s", "broker_peak_mb"}
    assert contract | {"round_without_s", "slow_ratio", "deadline_s", "rate_bytes_s", "link"} <= told.keys()


def test_a_block_takes_its_time_at_the_rate() -> None:
    assert slow_client.block_bytes(1e7) == 4_000_000  # 0.4 s each way


def test_it_is_told_how_often_one_of_the_others_was_missed() -> None:
    of_three = finished((9.0, 10.0, 11.1, 12.2, 13.3), ("bcd", "abcd", "abd", "acd", "abc"))
    for runs, missed in (((EQUAL, of_three), (0, 2)), ((of_three, WITH_A_SLOW_ONE), (2, 0))):
        found = slow_client.row(*runs)
        assert (found["fast_missed_without"], found["fast_missed"]) == missed  # the first two rounds warm up


def test_a_quorum_without_the_slow_one_does_for_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float, int]] = []
    rates: list[Sequence[float]] = []

    def run(each: Exchange, _folder: Path, _links: None) -> Finished:
        asked.append((each.quorum, each.deadline_s, each.excused))
        return (EQUAL, WITH_A_SLOW_ONE)[len(asked) - 1]

    def network(_kind: str, given: Sequence[float]) -> contextlib.AbstractContextManager[None]:
        rates.append(given)
        return contextlib.nullcontext()

    monkeypatch.setattr(exchange, "run", run)
    monkeypatch.setattr(slow_client, "network", network)
    assert slow_client.measure(SLOW, tmp_path) == slow_client.row(EQUAL, WITH_A_SLOW_ONE)
    assert asked == [(3, 0.05, 1)] * 2
    assert rates == [[1e7, 1e7, 1e7, 1e7], [1e7, 1e7, 1e7, 1e6]]


def test_the_slow_ones_table_and_plot(tmp_path: Path) -> None:
    found = slow_client.row(EQUAL, WITH_A_SLOW_ONE)
    assert "1.100" in shown(slow_client.table(found))
    slow_client.plot(found).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# Small measurements -------------------------------------------------------------------------------------------


def test_one_small_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.json"
    assert scale.main(["--clients", "2,5", "--block", "4KiB", "--rounds", "3", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert [row["clients"] for row in printed["rows"]] == [2, 5]
    assert printed["round_s"] > 0
    assert out.with_suffix(".png").stat().st_size > 1000


def test_one_small_measurement_with_a_slow_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_client, "PAUSE_S", 0.0)
    small = ["--slow-one", "--link", "user", "--rate", "8mbit", "--block", "8KiB", "--rounds", "3", "--deadline", "50"]
    assert scale.main(small) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["link"] == "user"
    # No deadline passes, however busy the machine, and all wait for the slow one: its block goes up and down at
    # 0.1 MB/s, but for the little that a link catches up after a rest.
    assert printed["slow_counted"] == 5
    assert printed["round_s"] > 1.5 * 8192 / 1e5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--clients", "0"], "--clients takes numbers above zero"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--blocks", "0"], "--blocks must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--block", "7"], "--block is a multiple of 4 bytes"),
        (["--block", "much"], "is not a size"),
        (["--rate", "0mbit"], "above zero"),
        (["--deadline", "0"], "--deadline is a time above zero"),
        (["--quick", "--clients", "256"], "--quick ends within 60 s"),
        (["--slow-one", "--clients", "4"], "leave out --clients"),
        (["--slow-one", "--rounds", "1"], "at least 2 --rounds"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale.main(arguments) == 2
    assert complaint in capsys.readouterr().err
