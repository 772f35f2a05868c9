"""The trace: what is written is what is read, also after a kill at any byte."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest

from parablock.trace import BROKER, LANES, Trace, TraceError, client_process, read_trace

if TYPE_CHECKING:
    from pathlib import Path


def write_example(path: Path, *, close: bool = True) -> Trace:
    trace = Trace(path)
    trace.name_process(BROKER, "broker")
    trace.name_process(client_process(0), "häuser & söhne")
    trace.span(client_process(0), "compute", "round 3 · layers 0-2", 1.25, 2.5, round=3)
    trace.span(client_process(0), "upload", "round 3", 2.5, 3.000001, round=3, bytes=1 << 20)
    trace.span(BROKER, "fold", "round 3", 3.0, 3.0)
    trace.span(client_process(1), "download", "round 3", 3.0, 3.5)
    if close:
        trace.close()
    return trace


def test_spans_come_back_as_they_were(tmp_path: Path) -> None:
    write_example(tmp_path / "trace.json")
    compute, upload, fold, download = read_trace(tmp_path / "trace.json")
    assert (compute.process, compute.process_name, compute.lane) == (1, "häuser & söhne", "compute")
    assert (compute.name, compute.start_s, compute.end_s) == ("round 3 · layers 0-2", 1.25, 2.5)
    assert upload.args == {"round": 3, "bytes": 1 << 20}
    assert upload.end_s == pytest.approx(3.000001, abs=1e-9)
    assert (fold.process_name, fold.lane, fold.start_s, fold.end_s) == ("broker", "fold", 3.0, 3.0)
    assert download.process_name == "process 2"  # nobody has named it


def test_a_closed_trace_is_strict_json_in_chromes_format(tmp_path: Path) -> None:
    trace = write_example(tmp_path / "trace.json")
    trace.close()  # again: nothing more is written
    events: list[dict[str, Any]] = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    complete = [event for event in events if event["ph"] == "X"]
    assert complete[0] == {
        "ph": "X", "cat": "compute", "name": "round 3 · layers 0-2", "pid": 1, "tid": 1,
        "ts": 1_250_000, "dur": 1_250_000, "args": {"round": 3},
    }  # fmt: skip
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert threads == {(1, 1): "compute", (1, 2): "upload", (0, 4): "fold", (2, 3): "download"}
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {0: "broker", 1: "häuser & söhne"}


def test_an_empty_trace_is_strict_json_too(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json"):
        pass
    assert json.loads((tmp_path / "trace.json").read_text()) == []
    assert read_trace(tmp_path / "trace.json") == []


def test_a_running_runs_trace_is_readable(tmp_path: Path) -> None:
    trace = write_example(tmp_path / "trace.json", close=False)
    assert len(read_trace(tmp_path / "trace.json")) == 4
    trace.close()


def test_a_trace_cut_at_any_byte_gives_the_spans_before_the_cut(tmp_path: Path) -> None:
    write_example(tmp_path / "trace.json")
    spans = read_trace(tmp_path / "trace.json")
    content = (tmp_path / "trace.json").read_bytes()
    seen = set()
    for cut in range(len(content)):
        (tmp_path / "cut.json").write_bytes(content[:cut])
        found = [(span.process, span.lane, span.start_s) for span in read_trace(tmp_path / "cut.json")]
        assert found == [(span.process, span.lane, span.start_s) for span in spans[: len(found)]]
        assert len(found) >= content[:cut].count(b'"ph":"X"') - 1
        seen.add(len(found))
    assert seen == {0, 1, 2, 3, 4}


def test_spans_that_touch_still_touch_in_microseconds(tmp_path: Path) -> None:
    edges = [number / 3 for number in range(50)]
    with Trace(tmp_path / "trace.json") as trace:
        for start_s, end_s in itertools.pairwise(edges):
            trace.span(1, "compute", "round 0", start_s, end_s)
    spans = read_trace(tmp_path / "trace.json")
    assert all(span.end_s == following.start_s for span, following in itertools.pairwise(spans))


@pytest.mark.parametrize("line", ['{"ph":"X", torn', '"text"', '{"ph":"X","name":"no times"}'])
def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(f'[\n{line},\n{{"ph":"M","name":"process_name","pid":0,"args":{{"name":"broker"}}}}\n]\n')
    with pytest.raises(TraceError, match=r"trace\.json, line 2 is not a .*trace event.*delete the file"):
        read_trace(path)


def test_a_trace_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the trace"):
        read_trace(tmp_path / "trace.json")


def test_a_thread_that_this_version_does_not_know_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[\n{"ph":"X","name":"n","pid":0,"tid":77,"ts":0,"dur":1}')
    (span,) = read_trace(path)
    assert 77 not in LANES.values()
    assert span.lane == "thread 77"


def test_an_unknown_lane_and_a_span_that_ends_before_it_starts_are_our_own_bugs(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        with pytest.raises(AssertionError, match="no lane 'gpu'"):
            trace.span(0, "gpu", "round 0", 0, 1)
        with pytest.raises(AssertionError, match="before its start"):
            trace.span(0, "fold", "round 0", 2, 1)


@pytest.mark.parametrize("closed", [True, False])
def test_a_trace_goes_on_where_another_has_ended(tmp_path: Path, closed: bool) -> None:
    path = tmp_path / "trace.json"
    write_example(path, close=closed)._file.close()
    with Trace(path, resume=True) as trace:
        assert trace.parties == {BROKER: "broker", 1: "häuser & söhne"}
        trace.name_process(client_process(1), "bob")
        trace.span(client_process(1), "upload", "round 4", 5.0, 6.0)
    json.loads(path.read_text(encoding="utf-8"))
    spans = read_trace(path)
    assert [span.name for span in spans[-2:]] == ["round 3", "round 4"]
    assert [span.process_name for span in spans] == ["häuser & söhne", "häuser & söhne", "broker", "bob", "bob"]


def test_a_trace_that_was_cut_anywhere_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_example(path, close=False)._file.close()
    content = path.read_bytes()
    for cut in range(0, len(content) + 1, 3):
        path.write_bytes(content[:cut])
        before = read_trace(path)
        with Trace(path, resume=True) as trace:
            trace.span(BROKER, "fold", "after", 9.0, 9.5)
        assert [span.name for span in read_trace(path)] == [*(span.name for span in before), "after"]
        json.loads(path.read_text(encoding="utf-8"))


def test_where_there_is_no_trace_one_begins(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json", resume=True) as trace:
        assert trace.parties == {}
    assert json.loads((tmp_path / "trace.json").read_text()) == []
