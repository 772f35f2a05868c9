"""Admission: whose model is the run's, when the run begins, and with which round each worker does.

A broker that was restarted begins with what its journal holds (`parablock.saved`), and those who took part are expected
back: they count as members of the open rounds until they have come, or `network.timeout_s` have passed since the first
event. Where no round was committed the run gathers once more; if a worker says that it had begun, no longer than that,
once the quorum is there.

What is said to whoever is let in or not is `parablock.coordinator`'s business, who is there `parablock.roster`'s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parablock.messages import Start
from parablock.sessions import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.agenda import Agenda
    from parablock.config import Config
    from parablock.distribution import Distribution
    from parablock.manifest import Manifest
    from parablock.messages import Join
    from parablock.roster import Roster
    from parablock.sessions import Session


class Admission:
    """base, tokenizer: digests that workers must show. epoch: which incarnation of the run's broker this is.

    due_by: a Tick is needed by then. Times in seconds. next_round, wherever it is asked for: the first that is not
    committed.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        base: str,
        tokenizer: str,
        epoch: int,
        agenda: Agenda,
        roster: Roster,
        distribution: Distribution,
        due_by: Callable[[float], None],
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._base = base
        self._tokenizer = tokenizer
        self._epoch = epoch
        self._agenda = agenda
        self._roster = roster
        self._distribution = distribution
        self._due_by = due_by
        self._expected_until: float | None = None  # None: until so long after the first event
        self._begins_at = math.inf  # the run, with those that are there

    def objection(self, join: Join) -> str | None:
        """Why a worker is not let in; None: it is."""
        differs = []
        if join.manifest != self._manifest.digest:
            differs.append("its blocks (names, shapes, dtypes or grouping of the parameters)")
        if join.base != self._base:
            differs.append("its weights")
        if join.tokenizer != self._tokenizer:
            differs.append("its tokenizer")
        if differs:
            return (
                f"the worker's model differs from the broker's in {', '.join(differs)}; "
                f"load the same model as the run's ({self._config.model}), by --model if it lies elsewhere"
            )
        if join.rows == 0:
            return "the worker has no training rows"
        if len(join.versions) != len(self._manifest.blocks):
            return f"the worker names versions of {len(join.versions)} blocks, the run has {len(self._manifest.blocks)}"
        return None

    def gathers(self, join: Join, now: float) -> None:
        """A worker is there before the run begins."""
        if self._epoch > 1 and join.position >= 0 and math.isinf(self._begins_at):
            self._begins_at = now + self._config.network.timeout_s
            self._due_by(self._begins_at)

    def gathered(self, now: float) -> bool:
        """Whether all are there with whom the run begins.

        A broker that was restarted and whose journal is empty may learn from a worker that the run had begun. One that
        has gone since will not come again: the run does not wait for it longer than it would have then.
        """
        there = len(self._roster.clients)
        if now >= self._begins_at and there >= self._config.quorum:
            return True
        return there >= self._config.round.clients

    def begin(self, next_round: int) -> list[tuple[Session, Start]]:
        """The run begins with those who have joined; what is to be said to each."""
        self._begins_at = math.inf
        self._agenda.decide(self._config.in_flight, self._roster.clients)
        joined = [session for session in self._roster if session.state is SessionState.JOINED]
        return [(session, self._start(session, 0, (), next_round)) for session in joined]

    def admit(self, session: Session, join: Join, next_round: int, next_open: int, now: float) -> Start:
        """Let a worker in after the start: what changed since its versions first, then a round that it can reach.

        One that has come back and has not fallen behind the next commit has answers to all open rounds, or is about
        to: it takes part in them. Clients may be as far as in_flight rounds beyond the next commit; a newcomer begins
        right after those, so that nobody waits for it, unless the round at hand lacks the quorum. So does one that
        says to be farther: what it has is of another state of this run, or it lies.

        next_open: the first round with which one may begin. With `privacy.where = "local"` it is not one that is being
        written to disk: what a client gave to that would be in vain, and nothing would tell that it has left.
        """
        self._roster.unexpect(session.name)
        pending = self._distribution.catch_up(session, join.versions, now)
        short = len(self._roster.members(next_open)) < self._config.quorum
        beyond = next_round + self._config.in_flight + 1
        first = next_open if short or next_round <= join.position <= beyond else beyond
        first = min(first, self._config.rounds)
        self._agenda.join(session.name, first, self._roster.present())
        return self._start(session, first, pending, next_round)

    def _start(self, session: Session, first: int, pending: tuple[int, ...], next_round: int) -> Start:
        # What is beyond these is said with the commit that is on its way to the disk.
        turns = self._agenda.turns(next_round, session.name)[: self._config.in_flight + 1]
        blocks, trains = tuple(turn.block for turn in turns), tuple(turn.trains for turn in turns)
        start = Start(first, len(self._roster.clients), next_round, pending, blocks, trains)
        self._roster.start(session, start)
        return start

    def missed(self, now: float) -> list[str]:
        """After a restart: the time runs from the first event on; those who have not come by then are lost."""
        if self._expected_until is None:
            self._expected_until = now + self._config.network.timeout_s
        if now < self._expected_until:
            return []
        self._expected_until = math.inf
        missed = self._roster.expected
        for name in missed:
            self._roster.unexpect(name)
        return missed

    def due(self, now: float) -> float:
        """When to look again at what has not come; infinite: not before something does."""
        due = self._begins_at if now < self._begins_at else math.inf
        if self._roster.expected:
            assert self._expected_until is not None
            due = min(due, self._expected_until)
        return due
