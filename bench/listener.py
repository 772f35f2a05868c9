"""What a client heard and did, line by line on disk as it happens, so that a SIGKILL takes none of it back.

A `ListeningLink` is the worker's link that writes down each commit, each start and each contribution, with the clock
that all processes of a machine share. `bench.invariants` holds these lines against the journal.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from parablock.append_file import AppendFile, cut_torn_line
from parablock.messages import Commit, Start
from parablock.participant_events import Contribute, Received
from workers.link import Link

if TYPE_CHECKING:
    from pathlib import Path

    from parablock.participant_events import Event

What = Literal["born", "start", "commit", "contribute"]


@dataclass(frozen=True)
class Line:
    """One thing that happened to one client.

    at: time.monotonic. born: its process has begun, and what follows is of that one. start: it is in session, from
    `round` on. commit: it was told that a round is closed, by whichever broker of that epoch; attempt, contributors,
    counted as in `parablock.messages.Commit`. contribute: it has trained a round; weight, steps, loss as offered.
    """

    at: float
    what: What
    epoch: int = 0
    round: int = -1
    block: int = -1
    attempt: int = 0
    contributors: int = 0
    counted: bool = False
    weight: int = 0
    steps: int = 0
    loss: float = 0.0


class ListeningLink(Link):
    """log: a file of lines, which an earlier process of the client may have begun. Everything else: as `Link`."""

    def __init__(self, log: Path, *arguments: Any, **named: Any) -> None:
        if log.exists():
            cut_torn_line(log)
        self._log = AppendFile(log)
        self._write(Line(time.monotonic(), "born"))
        super().__init__(*arguments, **named)

    def handle(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Received(envelope) if isinstance(envelope.message, Commit):
                told = envelope.message
                self._write(Line(now, "commit", envelope.epoch, told.round, told.block, told.attempt,
                                 told.contributors, told.counted))  # fmt: skip
            case Received(envelope) if isinstance(envelope.message, Start):
                self._write(Line(now, "start", envelope.epoch, envelope.message.round))
            case Contribute():
                self._write(Line(now, "contribute", round=event.round, block=event.block, weight=event.weight,
                                 steps=event.steps, loss=event.loss))  # fmt: skip
        super().handle(event)

    def close(self) -> None:
        super().close()
        self._log.close()

    def _write(self, line: Line) -> None:
        self._log.append(json.dumps(asdict(line)) + "\n")


class Ear:
    """Reads a growing file of lines, each once and only whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Line]:
        """What is new."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [_line(json.loads(line)) for line in whole.splitlines()]


def _line(fields: dict[str, Any]) -> Line:
    line = Line(**fields)
    assert line.what in get_args(What), f"a line of an unknown kind: {line}"
    return line
