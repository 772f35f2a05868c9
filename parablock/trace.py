"""The trace: who did what when, in Chrome's trace format (open trace.json at https://ui.perfetto.dev).

The file is a JSON array with one event per line, written as the run goes. A run that was killed leaves an
array without its closing bracket, which Perfetto, Chrome and `read_trace` accept; `Trace.close` makes it
strict JSON. A process of the trace is a party of the run (the broker, then each client), its threads are the
party's lanes. Measuring the times, and putting the clients' clocks on the broker's, is the caller's business.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parablock.append_file import AppendFile

BROKER = 0
"""The broker's process number; client i (from 0, in roster order) has `client_process(i)`."""

LANES = {"compute": 1, "upload": 2, "download": 3, "fold": 4}
"""Thread number of each lane. Waiting for the network is a span in the compute lane, named "wait…"."""


class TraceError(ValueError):
    """A trace file cannot be read. The message names the file and the line."""


@dataclass(frozen=True)
class Span:
    """Something that took time. Seconds count from the run's start."""

    process: int
    process_name: str
    lane: str
    name: str
    start_s: float
    end_s: float
    args: dict[str, Any]


def client_process(index: int) -> int:
    """The process number of client `index`, counted from 0."""
    return index + 1


class Trace:
    """Writes a trace file, each event flushed as it is added."""

    def __init__(self, path: Path | str, *, resume: bool = False) -> None:
        """Start a new file at `path`, or go on with one that is there. Raises OSError where it cannot be written.

        parties: by number, the names that the file tells.
        """
        path = Path(path)
        self.parties: dict[int, str] = {}
        self._separator = "\n"
        self._named: set[tuple[int, str]] = set()
        if resume and path.exists() and path.stat().st_size:
            self._cut(path)
            self._file = AppendFile(path)
        else:
            self._file = AppendFile(path, truncate=True)
            self._file.append("[")

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, path: Path) -> None:
        """Drop the array's end, and a last event that was cut off, and see who is named."""
        lines = path.read_bytes().split(b"\n")
        while len(lines) > 1 and not _whole(lines[-1]):
            lines.pop()
        for line in lines:
            if b'"process_name"' in line and (event := _whole(line)) is not None:
                self.parties[int(event["pid"])] = str(event["args"]["name"])
        kept = b"\n".join(lines)
        os.truncate(path, len(kept.removesuffix(b",")))
        self._separator = ",\n" if len(lines) > 1 else "\n"

    def name_process(self, process: int, name: str) -> None:
        """Say what people call a party: "broker", or the client's name."""
        self.parties[process] = name
        about = {"ph": "M", "pid": process, "tid": 0}
        self._write(
            {**about, "name": "process_name", "args": {"name": name}},
            {**about, "name": "process_sort_index", "args": {"sort_index": process}},
        )

    def span(self, process: int, lane: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Add what `process` did in `lane` from `start_s` to `end_s`, in seconds since the run's start.

        args: further facts, shown when the span is selected (round=3, bytes=1048576); JSON values.
        """
        assert lane in LANES, f"no lane {lane!r}; there are {', '.join(LANES)}"
        assert end_s >= start_s, f"the span {name!r} ends at {end_s} s, before its start at {start_s} s"
        about = {"pid": process, "tid": LANES[lane]}
        names = (
            {"ph": "M", "name": "thread_name", **about, "args": {"name": lane}},
            {"ph": "M", "name": "thread_sort_index", **about, "args": {"sort_index": LANES[lane]}},
        )
        # Both ends are rounded, not the duration: two spans that touch still touch.
        start_us, end_us = round(start_s * 1e6), round(end_s * 1e6)
        span = {"ph": "X", "cat": lane, "name": name, **about, "ts": start_us, "dur": end_us - start_us, "args": args}
        self._write(*(() if (process, lane) in self._named else names), span)
        self._named.add((process, lane))

    def close(self) -> None:
        """End the array and close the file. Closing again does nothing."""
        if not self._file.closed:
            self._file.append("\n]\n")
            self._file.close()

    def _write(self, *events: dict[str, Any]) -> None:
        """All of the events, or none where the disk refuses."""
        lines = [json.dumps(event, allow_nan=False, ensure_ascii=False, separators=(",", ":")) for event in events]
        self._file.append(self._separator + ",\n".join(lines))
        self._separator = ",\n"


def read_trace(path: Path | str) -> list[Span]:
    """The spans of a trace in the order of the file, also of one that was cut off in its last line.

    Raises TraceError where the file cannot be read or another line is damaged.
    """
    path = Path(path)
    names: dict[int, str] = {}
    spans: list[Span] = []
    lanes = {number: lane for lane, number in LANES.items()}
    for number, event in _events(path):
        try:
            if event["ph"] == "M" and event["name"] == "process_name":
                names[int(event["pid"])] = str(event["args"]["name"])
            elif event["ph"] == "X":
                start_us, end_us = float(event["ts"]), float(event["ts"]) + float(event["dur"])
                process, thread = int(event["pid"]), int(event["tid"])
                lane = lanes.get(thread, f"thread {thread}")
                args = dict(event.get("args", {}))
                spans.append(Span(process, "", lane, str(event["name"]), start_us / 1e6, end_us / 1e6, args))
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {number} is not a whole trace event ({error!r}); {_ADVICE}") from error
    # A name may come after the first span of its process, so it is filled in last.
    return [replace(span, process_name=names.get(span.process, f"process {span.process}")) for span in spans]


def _whole(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None where there is none, or only a part of one."""
    try:
        event = json.loads(line.strip().removesuffix(b","))
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


_ADVICE = "delete the file to go on without a time line"


def _events(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of the file with their line numbers, without a last one that was cut off."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror or error}") from error
    events: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip().removesuffix(",")
        if text in ("", "[", "]"):
            continue
        try:
            event = json.loads(text)
            if not isinstance(event, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break  # the run was killed while it wrote this line
            raise TraceError(f"{path}, line {number} is not a trace event ({error}); {_ADVICE}") from error
        events.append((number, event))
    return events
