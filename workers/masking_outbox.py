"""The outbox of masked contributions: encodes them on a thread as soon as there are masks, which come from the link.

A delta stays here until its round is closed: a broker that was restarted has other masks, and gets it encoded anew.
Knows no message.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from parablock.conveyor import Conveyor
from parablock.layout import Layout
from parablock.transfer import Encoded

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.config import Config
    from parablock.masker import Masker
    from workers.outbox import Leaving


@dataclass(eq=False)
class _Job:
    """A contribution under one round's masks, on the thread. refused: it cannot be masked."""

    round: int
    delta: Leaving
    tokens: int
    layout: Layout
    masker: Masker
    refused: bool = False


class MaskingOutbox:
    """Lives on the event loop; there `on_chunk(round, chunk)` is called, in order, for each chunk of a delta, and
    `on_refusal(round, reason)` for one that cannot be masked."""

    def __init__(
        self,
        config: Config,
        on_chunk: Callable[[int, Encoded], None],
        on_refusal: Callable[[int, str], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._on_chunk = on_chunk
        self._on_refusal = on_refusal
        self._deltas: dict[int, tuple[Leaving, int]] = {}  # by round, with its tokens
        self._maskers: dict[int, Masker] = {}  # by round
        self._jobs: dict[int, _Job] = {}  # by round, the one whose chunks count
        self._conveyor: Conveyor[tuple[_Job, Encoded | str]] = Conveyor(
            "encode", asyncio.get_running_loop().call_soon_threadsafe, on_result=self._done, on_error=on_error
        )

    def put(self, round: int, delta: Leaving, tokens: int) -> None:
        """A contribution, trained on so many tokens; it is waited for on the thread."""
        self._deltas[round] = delta, tokens
        self._encode(round)

    def mask(self, round: int, masker: Masker | None) -> None:
        """As `participant_events.Mask` has it."""
        self._jobs.pop(round, None)
        self._maskers.pop(round, None)
        if masker is not None:
            self._maskers[round] = masker
            self._conveyor.put(masker.prepare)  # mostly while the round still trains
            self._encode(round)

    def closed(self, before: int) -> None:
        """Of rounds before it nothing is needed any more."""
        for held in (self._deltas, self._maskers, self._jobs):
            for round in [round for round in held if round < before]:
                del held[round]

    def close(self) -> None:
        self._conveyor.close()

    def _encode(self, round: int) -> None:
        if round not in self._deltas or round not in self._maskers:
            return
        delta, tokens = self._deltas[round]
        job = _Job(round, delta, tokens, Layout.up(self._config, delta.numel), self._maskers[round])
        self._jobs[round] = job
        for index in range(job.layout.count):
            self._conveyor.put(partial(self._chunk, job, index))

    def _chunk(self, job: _Job, index: int) -> tuple[_Job, Encoded | str] | None:
        """On the thread."""
        if job.refused or self._jobs.get(job.round) is not job:
            return None  # nobody wants it any more
        delta = job.delta.wait()
        if not index and (reason := job.masker.objection(delta, job.tokens)) is not None:
            job.refused = True
            return job, reason
        return job, Encoded.checked(job.masker.mask(delta[job.layout.part(index)], job.tokens, index))

    def _done(self, result: tuple[_Job, Encoded | str]) -> None:
        job, made = result
        if self._jobs.get(job.round) is not job:
            return
        if isinstance(made, str):
            del self._jobs[job.round]
            self._on_refusal(job.round, made)
        else:
            self._on_chunk(job.round, made)
