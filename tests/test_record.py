"""The record of a run: rows of metrics, events and trace, from what the coordinator and the clients say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from broker.record import Record
from parablock.config import Config
from parablock.coordinator_events import Committed, Note, Reported
from parablock.manifest import Block, Manifest, Slot
from parablock.messages import Heartbeat, Landed
from parablock.run_folder import RunFolder
from parablock.saved import Entry
from parablock.trace import read_trace
from tests.test_evaluations import shares

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MANIFEST = Manifest(tuple(Block(i, f"layer {i}", (Slot(f"w{i}", (4,), "float32", 0),)) for i in range(2)), ())
BEGAN = 1000.0
AHEAD = {"a": 500.0, "b": -300.0}  # how far the clients' clocks are from the broker's


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        record = Record(folder, MANIFEST, Config(), BEGAN)
        for client, offset in AHEAD.items():
            for delay in (0.5, 0.0, 0.2):  # the smallest delay counts
                beat = Heartbeat(BEGAN + offset - delay, 0, 0, "training")
                record.reported(Reported(client, beat), AHEAD, BEGAN)
        yield record
        record.close()


def rows(record: Record) -> list[dict[str, Any]]:
    return record._folder.read_metrics()


def commit(record: Record, round: int, at: float, clients: tuple[str, ...] = ("a", "b")) -> None:
    record.committed(Committed(round, round % 2, clients, 0, 1.5, 32, 32, "2 contributions"), clients, BEGAN + at)


def land(record: Record, client: str, round: int, steps: int = 8, **spans: tuple[float, float]) -> None:
    """spans: in seconds since the run began, as the broker should see them."""
    offset = BEGAN + AHEAD[client]
    moved = {name: (start + offset, end + offset) for name, (start, end) in spans.items()}
    times = dict.fromkeys(("computing", "uploading", "downloading", "waiting"), (0.0, 0.0)) | moved
    report = Landed(round=round, alpha=0.5, drift=0.25, miss=0.75, steps=steps, staleness=1, loop_lag_ms=2.0, **times)
    record.reported(Reported(client, report), ("a", "b"), BEGAN + 99)


def test_a_rounds_row_is_on_one_time_line_whatever_the_clients_clocks_say(record: Record) -> None:
    commit(record, 0, at=4.0)
    land(record, "a", 0, computing=(1, 3), uploading=(3, 3.5), downloading=(4, 5), waiting=(4.5, 5))
    assert rows(record) == [], "b has not told yet"
    land(record, "b", 0, computing=(1.5, 2), uploading=(2, 2.5), downloading=(4, 4.5), waiting=(2, 4.5))
    (row,) = rows(record)
    assert (row["kind"], row["round"], row["block_name"], row["contributors"]) == ("round", 0, "layer 0", ["a", "b"])
    assert row["compute_s"] == pytest.approx(2.0)
    assert row["comm_s"] == pytest.approx(2.0), "from the last delta, at 3, to the last block, at 5"
    assert row["exposed_s"] == pytest.approx(1.5), "b waited from 2 on, but before 3 for a, not for the network"
    assert row["wait_s"] == pytest.approx(2.5)
    assert row["round_s"] == pytest.approx(3.0), "the first round begins with training"
    assert (row["alpha"], row["drift"], row["miss"]) == (0.5, 0.25, 0.75)
    assert (row["staleness"], row["loop_lag_p99_ms"]) == (1.0, 2.0)
    commit(record, 1, at=6.5)
    record.close()
    assert rows(record)[1]["round_s"] == pytest.approx(2.5), "and later ones with the commit before"
    uploads = [span for span in read_trace(record._folder.trace_path) if span.lane == "upload"]
    assert [(s.process_name, pytest.approx(s.start_s)) for s in uploads] == [("a", 3.0), ("b", 2.0)]


def test_a_client_reports_on_a_round_once(record: Record) -> None:
    commit(record, 0, at=4.0)
    for _ in range(50):
        land(record, "a", 0, computing=(1, 3), uploading=(3, 3.5))
    land(record, "a", 0, computing=(1, 9))
    land(record, "b", 0, computing=(1, 2))
    assert rows(record)[0]["compute_s"] == pytest.approx(2.0)
    record.close()
    lanes = [span.lane for span in read_trace(record._folder.trace_path)]
    assert (lanes.count("compute"), lanes.count("upload")) == (2, 1), "it cannot fill the disk with them"


def test_an_exchange_begins_when_the_round_before_is_ready_too(record: Record) -> None:
    """Rounds that different clients train at the same time: b is done first, and a's round is committed first."""
    commit(record, 0, at=5.0, clients=("a",))
    commit(record, 1, at=5.1, clients=("b",))
    land(record, "a", 0, computing=(0, 4), downloading=(4.5, 5))
    land(record, "b", 1, computing=(1, 2), downloading=(5, 5.25), waiting=(2, 5.25))
    first, second = rows(record)
    assert (first["comm_s"], second["comm_s"]) == (pytest.approx(1.0), pytest.approx(1.25))
    assert second["exposed_s"] == pytest.approx(1.25)


def test_steps_are_the_mean_over_those_who_took_part(record: Record) -> None:
    commit(record, 0, at=1.0)
    land(record, "a", 0, steps=4)
    land(record, "b", 0, steps=7)
    commit(record, 1, at=2.0, clients=("a",))
    land(record, "a", 1, steps=4)
    record.close()
    assert [row["steps"] for row in rows(record)] == [5.5, 4.0]


def test_rows_come_in_the_order_of_rounds_and_a_lost_report_holds_up_nothing(record: Record) -> None:
    commit(record, 0, at=1.0)
    commit(record, 1, at=2.0)
    land(record, "b", 0, computing=(0, 1))
    land(record, "b", 1, computing=(1, 2))
    assert rows(record) == []
    land(record, "a", 1, computing=(1, 2))  # a's report on round 0 was lost with a connection
    assert [row["round"] for row in rows(record)] == [0, 1]


def test_a_client_that_is_gone_is_not_waited_for_and_its_clock_is_forgotten(record: Record) -> None:
    commit(record, 0, at=1.0)
    land(record, "b", 0, computing=(0, 1))
    record.gone("a")
    assert [row["compute_s"] for row in rows(record)] == [pytest.approx(1.0)]
    commit(record, 1, at=2.0)
    land(record, "a", 1, computing=(7, 9))  # a successor under its name, whose clock is not known yet
    land(record, "b", 1, computing=(1, 1.5))
    assert rows(record)[1]["compute_s"] == pytest.approx(0.5)


def test_an_evaluation_is_told_when_every_share_is_in(record: Record) -> None:
    clients = ("a", "b")
    record.reported(Reported("a", shares(-1, rows=3, loss=30.0)), clients, BEGAN + 1)
    assert rows(record) == []
    record.reported(Reported("b", shares(-1, rows=2, loss=10.0)), clients, BEGAN + 2)
    (row,) = rows(record)
    assert (row["kind"], row["round"], row["time_s"], row["rows"], row["eval_loss"]) == ("evaluation", -1, 2.0, 5, 2.0)
    assert [told["round"] for told in record.fresh] == [-1], "and shown"


def test_an_evaluation_does_not_wait_for_who_is_gone_nor_for_the_end(record: Record) -> None:
    record.reported(Reported("a", shares(-1)), ("a", "b"), BEGAN + 1)
    record.gone("b")
    assert [row["round"] for row in rows(record)] == [-1]
    for round in range(40):
        commit(record, round, at=2.0)
    record.reported(Reported("a", shares(39)), ("a", "b"), BEGAN + 3)
    record.close()
    assert [row["round"] for row in rows(record) if row["kind"] == "evaluation"] == [-1, 39]


def test_what_the_disk_refuses_is_kept_and_written_later(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_row: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record._folder, "append_event", full)
        record.note(Note("joined", "a", "8 rows"), BEGAN + 1)
        record.note(Note("joined", "b", "9 rows"), BEGAN + 2)
    record.note(Note("left", "b", "done"), BEGAN + 3)
    assert [(event["kind"], event["client"], event["time_s"]) for event in record._folder.read_events()] == [
        ("joined", "a", 1.0),
        ("joined", "b", 2.0),
        ("left", "b", 3.0),
    ]
    record.close()
    json.loads(record._folder.trace_path.read_text())


def entry(round: int) -> Entry:
    counted = round != 2
    names = ("a", "b") if counted else ()
    numbers = (1, 3) if counted else ()
    return Entry(
        round, round % 2, int(counted), -1, names, numbers, numbers, (1.0, 2.0)[: len(names)], 0.0, 1, 64, 32, "all",
        {}, ("a", "b"), (),
    )  # fmt: skip


def test_a_record_goes_on_and_lacks_no_round(record: Record) -> None:
    """Rounds 0 to 3 are committed, and the broker that was killed had heard what became of 0 and 1."""
    for round in range(2):
        commit(record, round, at=4.0 + round)
        for client in "ab":
            land(record, client, round, computing=(1 + round, 2 + round), uploading=(2 + round, 3 + round))
    record.reported(Reported("a", shares(-1)), ("a",), BEGAN + 1)
    folder = record._folder
    before = folder.read_metrics()
    again = Record(folder, MANIFEST, Config(), BEGAN, before, [entry(round) for round in range(4)])
    assert [row["round"] for row in again.fresh] == [2, 3], "what is new is shown"
    assert folder.read_metrics()[: len(before)] == before
    missing, other = folder.read_metrics()[len(before) :]
    assert missing.keys() == before[0].keys()
    assert (missing["round"], missing["loss"], missing["contributors"], missing["late"]) == (2, None, [], 1)
    assert (other["loss"], other["bytes_up"], other["block_name"]) == (1.75, 64, "layer 1")
    assert [other[key] for key in ("time_s", "compute_s", "comm_s", "round_s", "alpha")] == [None] * 5
    land(again, "a", 3, computing=(4, 5))  # the row is written
    again.reported(Reported("b", shares(-1)), ("b",), BEGAN + 9)  # and so is this one
    commit(again, 4, at=9.0)
    for client, offset in AHEAD.items():
        again.reported(Reported(client, Heartbeat(BEGAN + offset, 0, 0, "training")), AHEAD, BEGAN)
        land(again, client, 4, computing=(5, 8), uploading=(8, 8.5))
    again.close()
    rows_by_kind = [(row["kind"], row["round"]) for row in folder.read_metrics()]
    assert rows_by_kind == [
        ("round", 0), ("round", 1), ("evaluation", -1), ("round", 2), ("round", 3), ("round", 4)
    ]  # fmt: skip
    assert folder.read_metrics()[-1]["time_s"] == 9.0
    assert folder.read_metrics()[-1]["round_s"] == pytest.approx(4.0), "since its training began"
    assert {(span.process, span.process_name) for span in read_trace(folder.trace_path)} == {(1, "a"), (2, "b")}


def test_who_was_left_out_or_cut_is_in_the_rounds_row(record: Record) -> None:
    said = Committed(0, 0, ("a",), 0, 1.5, 32, 32, "1 contributions; left out: b", (), ("b",), ("a",))
    record.committed(said, (), BEGAN + 1.0)
    land(record, "a", 0)
    (row,) = rows(record)
    assert (row["contributors"], row["left_out"], row["clipped"]) == (["a"], ["b"], ["a"])
