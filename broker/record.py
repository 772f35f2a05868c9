"""The record of a run: what the coordinator and the clients say becomes rows of metrics, events and trace.

A round's row is written when everybody who took part has told how it went, or has gone. Client clocks are mapped onto
the broker's by the smallest delay seen between a heartbeat's clock and its arrival, so that spans of different
machines share one time line to within one way of the link.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from broker.evaluations import Evaluations
from parablock.ledger import Ledger
from parablock.messages import Evaluated, Heartbeat, Landed
from parablock.trace import BROKER, Trace, client_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from parablock.config import Config
    from parablock.coordinator_events import Committed, Note, Reported
    from parablock.manifest import Manifest
    from parablock.run_folder import RunFolder
    from parablock.saved import Entry

log = logging.getLogger("broker")

_COLUMNS = (
    "kind", "round", "block", "block_name", "time_s", "loss", "compute_s", "comm_s", "exposed_s", "wait_s", "round_s",
    "bytes_up", "bytes_down", "contributors", "late", "folded_late", "left_out", "clipped", "staleness", "steps",
    "drift", "alpha", "miss", "loop_lag_p99_ms", "epsilon",
)  # fmt: skip
"""Of a round's row, in their order."""


@dataclass
class _Row:
    committed: Committed
    at: float
    epsilon: float | None  # what the rounds through this one have cost the client that has given to most of them
    before: float | None  # when the round before it was committed
    waiting_for: set[str]
    landed: dict[str, Landed] = field(default_factory=dict)


class Record:
    """Writes into `folder`. Times given to it are of the broker's monotonic clock, in seconds; files count from the
    first moment, `began`.

    before: where the run goes on, the rows of metrics that are there. entries: and the rounds that are committed; of
    those whose reports the broker before has not lived to hear, what the journal knows is written now.
    """

    def __init__(
        self,
        folder: RunFolder,
        manifest: Manifest,
        config: Config,
        began: float,
        before: Iterable[Mapping[str, Any]] = (),
        entries: Iterable[Entry] = (),
    ) -> None:
        self.fresh: list[dict[str, Any]] = []  # rows written since somebody last took them from here
        self.trouble: OSError | None = None  # why the newest rows are not on disk
        self._unwritten: deque[Callable[[], None]] = deque()
        self._folder = folder
        self._manifest = manifest
        self._withheld = config.privacy.local  # what clients do not tell of their training
        self._ledger = Ledger(config.privacy)
        self._began = began
        self._committed_at: float | None = None
        self._ready_at = 0.0  # when the last delta was ready that was counted in a row that is written
        self._trace = Trace(folder.trace_path, resume=True)
        if BROKER not in self._trace.parties:
            self._trace.name_process(BROKER, "broker")
        self._processes = {name: number for number, name in self._trace.parties.items() if number != BROKER}
        self._offsets: dict[str, float] = {}
        self._rows: dict[int, _Row] = {}
        self._newest = -1  # the newest round that is committed
        written, told = set(), -2
        for row in before:
            if row["kind"] == "round":
                written.add(row["round"])
            else:
                told = max(told, row["round"])
        self._evaluations = Evaluations(config, told)
        for entry in entries:
            self._newest = entry.round
            self._ledger.take(entry.round, entry.charged)
            if entry.round not in written:
                self._write(self._unreported(entry))

    def note(self, note: Note, now: float) -> None:
        if note.told:
            self._event(now, note.kind, note.client, note.text)

    def folded(self, round: int, began: float, ended: float) -> None:
        span = (began - self._began, ended - self._began)
        self._put(lambda: self._trace.span(0, "fold", f"fold {self._name(round)}", *span, round=round))

    def committed(self, committed: Committed, clients: Iterable[str], now: float) -> None:
        """A round is closed; `clients` are on the roster and will report on it."""
        self._ledger.take(committed.round, committed.charged)
        self._rows[committed.round] = _Row(committed, now, self._ledger.epsilon, self._committed_at, set(clients))
        self._committed_at = now
        self._newest = committed.round
        text = f"round {committed.round}, block {committed.block}: {committed.reason}"
        self._event(now, "committed", "", text)

    def reported(self, reported: Reported, clients: Iterable[str], now: float) -> None:
        match reported.message:
            case Heartbeat(clock=clock):
                offset = now - clock
                self._offsets[reported.client] = min(offset, self._offsets.get(reported.client, math.inf))
            case Landed() as landed:
                row = self._rows.get(landed.round)
                if row is not None and reported.client not in row.landed:
                    landed = row.landed[reported.client] = self._mapped(reported.client, landed)
                    for number in [number for number in self._rows if number < landed.round]:
                        # A report that was lost with a connection must not hold up all that come after it.
                        self._rows[number].waiting_for.discard(reported.client)
                    self._place({*clients, reported.client})
                    self._draw(reported.client, landed, row.committed.block)
                    self._flush()
            case Evaluated() as share:
                told = self._evaluations.reported(reported.client, share, clients, self._newest, now - self._began)
                self._write(*told)

    def gone(self, client: str) -> None:
        """Nothing more will come from this client; under its name another one may, with another clock."""
        for row in self._rows.values():
            row.waiting_for.discard(client)
        self._offsets.pop(client, None)
        self._flush()
        self._write(*self._evaluations.gone(client))

    @property
    def epsilon(self) -> float | None:
        """What the committed rounds have cost so far, as a row says it."""
        return self._ledger.epsilon

    def close(self) -> None:
        """Write what is left, complete or not."""
        for row in self._rows.values():
            row.waiting_for.clear()
        self._flush()
        self._write(*self._evaluations.close())
        self._put(self._trace.close)

    def _name(self, round: int, block: int | None = None) -> str:
        return f"round {round}" if block is None else f"round {round} · {self._manifest.blocks[block].name}"

    def _mapped(self, client: str, landed: Landed) -> Landed:
        """The report with its intervals in seconds since the run began; empty where they cannot be placed."""
        offset = self._offsets.get(client)

        def moved(span: tuple[float, ...]) -> tuple[float, ...]:
            if offset is None or len(span) != 2 or span[1] <= span[0]:
                return ()
            return span[0] + offset - self._began, span[1] + offset - self._began

        return dataclasses.replace(
            landed,
            computing=moved(landed.computing),
            uploading=moved(landed.uploading),
            downloading=moved(landed.downloading),
            waiting=moved(landed.waiting),
        )

    def _place(self, clients: Iterable[str]) -> None:
        """Give each client its place in the trace, in the order of the roster."""
        for client in sorted(set(clients) - self._processes.keys()):
            self._processes[client] = client_process(len(self._processes))
            self._put(partial(self._trace.name_process, self._processes[client], client))

    def _draw(self, client: str, landed: Landed, block: int) -> None:
        process, name = self._processes[client], self._name(landed.round, block)
        for lane, label, span in (
            ("compute", name, landed.computing),
            ("compute", f"wait for {name}", landed.waiting),
            ("upload", name, landed.uploading),
            ("download", name, landed.downloading),
        ):
            if span:
                began, ended = span
                self._put(
                    partial(self._trace.span, process, lane, label, began, ended, round=landed.round, block=block)
                )

    def _flush(self) -> None:
        """Write complete rows, oldest first, so that the file is in the order of rounds."""
        for number in sorted(self._rows):
            row = self._rows[number]
            if row.waiting_for - row.landed.keys():
                return
            del self._rows[number]
            self._write(self._row(row))

    def _unreported(self, entry: Entry) -> dict[str, Any]:
        """The row of a round of which nothing but its entry is known."""
        return dict.fromkeys(_COLUMNS) | {
            "kind": "round",
            "round": entry.round,
            "block": entry.block,
            "block_name": self._manifest.blocks[entry.block].name,
            "loss": entry.loss,
            "bytes_up": entry.bytes_up,
            "bytes_down": entry.bytes_down,
            "contributors": list(entry.contributors),
            "late": entry.late,
            "folded_late": len(entry.folded_late),
            "left_out": list(entry.left_out),
            "clipped": list(entry.clipped),
            "epsilon": self._ledger.epsilon,
        }

    def _row(self, row: _Row) -> dict[str, Any]:
        committed, reports = row.committed, row.landed
        computing = [report.computing for report in reports.values() if report.computing]
        downloading = [report.downloading for report in reports.values() if report.downloading]
        waiting = [report.waiting for report in reports.values() if report.waiting]
        comm = exposed = None
        if computing and downloading:
            # The exchange: from the last delta ready to the block held everywhere. What a client waited before that
            # was not for the network, but for a slower client; perhaps for one in the round before, which comes first.
            ready = max(self._ready_at, *(end for _, end in computing))
            comm = max(max(end for _, end in downloading) - ready, 0.0)
            exposed = max((min(max(end - ready, 0.0), end - start, comm) for start, end in waiting), default=0.0)
        counted = [reports[client].computing for client in committed.contributors if client in reports]
        latest = row.at - self._began  # a delta that was counted was ready by then, whatever its client's clock says
        self._ready_at = max([self._ready_at, *(min(end, latest) for _, end in filter(None, counted))])
        before = row.before
        if before is None and computing:  # the first round begins with training, not with the run's preparations
            before = min(start for start, _ in computing) + self._began
        trained = [landed for client, landed in reports.items() if client in committed.contributors]
        told = [] if self._withheld else trained
        return {
            "kind": "round",
            "round": committed.round,
            "block": committed.block,
            "block_name": self._manifest.blocks[committed.block].name,
            "time_s": row.at - self._began,
            "loss": committed.loss,
            "compute_s": max((end - start for start, end in computing), default=None),
            "comm_s": comm,
            "exposed_s": exposed,
            "wait_s": max((end - start for start, end in waiting), default=0.0) if reports else None,
            "round_s": row.at - before if before is not None else None,
            "bytes_up": committed.bytes_up,
            "bytes_down": committed.bytes_down,
            "contributors": list(committed.contributors),
            "late": committed.late,
            "folded_late": len(committed.folded_late),
            "left_out": list(committed.left_out),
            "clipped": list(committed.clipped),
            "staleness": fmean(landed.staleness for landed in trained) if trained else None,
            "steps": fmean(landed.steps for landed in trained) if trained else None,
            "drift": fmean(landed.drift for landed in told) if told else None,
            "alpha": fmean(landed.alpha for landed in told) if told else None,
            "miss": fmean(landed.miss for landed in told) if told else None,
            "loop_lag_p99_ms": max((landed.loop_lag_ms for landed in reports.values()), default=None),
            "epsilon": row.epsilon,
        }

    def _write(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            self._put(partial(self._folder.append_metrics, row))
            self.fresh.append(row)

    def _event(self, now: float, kind: str, client: str, text: str) -> None:
        row = {"time_s": now - self._began, "kind": kind, "client": client, "text": text}
        self._put(lambda: self._folder.append_event(row))

    def _put(self, write: Callable[[], None]) -> None:
        """Write, after what is still waiting to be written. What the disk refuses waits here, and the run goes on."""
        self._unwritten.append(write)
        try:
            while self._unwritten:
                self._unwritten[0]()
                self._unwritten.popleft()
        except OSError as error:
            if self.trouble is None:
                log.error("cannot write the record of the run: %s; it is kept in memory until there is room", error)
            self.trouble = error
        else:
            self.trouble = None
