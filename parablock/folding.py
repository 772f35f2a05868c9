"""Folding: the attempts at the means of open rounds, chunk by chunk, and what leaves of them.

Aggregation cuts through: chunk c of the new block is folded and leaves as soon as chunk c is in from everybody who is
expected to count (`parablock.rounds.Attempt`), so that the way down begins while the way up goes on; or it is measured
then, where all of each contribution must be seen before any is folded (`parablock.verdict`).

Where the broker adds noise (`privacy.where = "central"`), nothing of a block leaves before its round is durable: what
is folded anew, after a change of mind or a restart, has other noise, and both together would tell more than one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.layout import Layout
from parablock.rounds import Attempt, RoundState

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.config import Config
    from parablock.coordinator_events import Effect
    from parablock.distribution import Distribution
    from parablock.late import Late
    from parablock.latecomers import Latecomers
    from parablock.manifest import Manifest
    from parablock.open_rounds import OpenRounds
    from parablock.roster import Roster
    from parablock.rounds import Round
    from parablock.sums import Sums
    from parablock.transfer import Encoded
    from parablock.verdict import Verdict


class Folding:
    """emit: asks for an effect. withheld: a block does not leave before its round is durable."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        roster: Roster,
        rounds: OpenRounds,
        latecomers: Latecomers,
        distribution: Distribution,
        emit: Callable[[Effect], None],
    ) -> None:
        self.withheld = config.privacy.central
        self._config = config
        self._manifest = manifest
        self._roster = roster
        self._rounds = rounds
        self._latecomers = latecomers
        self._distribution = distribution
        self._emit = emit

    def begin(self, round: Round, clients: tuple[str, ...], now: float) -> None:
        """Fold the contributions of `clients`, and late ones that are complete, from the first chunk on, unless that is
        being done; every active session is sent what comes."""
        late = self._latecomers.ready(round.block)
        if round.attempt is not None and (round.attempt.clients, round.attempt.late) == (clients, late):
            return
        count = Layout.up(self._config, self._manifest.blocks[round.block].numel).count
        held = [len(round.uploads[name].pieces) for name in clients]
        missing = [sum(pieces <= index for pieces in held) for index in range(count)]
        self._ship(round, clients, late, missing, now)
        for index, lacking in enumerate(missing):
            if not lacking:
                self._emit(round.next(index))

    def begin_sum(self, round: Round, now: float) -> None:
        """The same where contributions are masked: whom the attempt counts is known when all of it is unmasked."""
        self._ship(round, (), (), [], now)

    def _ship(
        self, round: Round, clients: tuple[str, ...], late: tuple[Late, ...], missing: list[int], now: float
    ) -> None:
        """Begin an attempt: every active session is sent what comes of it."""
        round.attempts += 1
        shipment = self._distribution.shipment(round.number, round.block, round.attempts)
        bad = self._config.robust.still_bad(len(round.unfit))
        round.attempt = Attempt(clients, late, missing, shipment, self._config.measured, bad)
        if not self.withheld:
            for session in self._roster.active():
                self._distribution.ship(session, shipment, now)

    def unmasked(self, sums: Sums, round: Round, now: float) -> None:
        """Fold the slices that can be unmasked. Whom the attempt counts is known when all of them are settled."""
        if (failure := sums.failure(round.number)) is not None:
            if round.state is RoundState.CLOSING:
                round.why += f"; nothing is counted: {failure}"
            round.attempt = None
            return
        for fold in sums.folds(round, round.attempts or 1):
            if round.attempt is None:
                self.begin_sum(round, now)
            self._emit(fold)
        if round.state is RoundState.CLOSING and round.attempt is not None:
            round.attempt.clients = sums.contributors(round.number)

    def attempt(self, number: int, attempt_number: int) -> Attempt | None:
        """What an answer is about; None if that attempt was given up."""
        round = self._rounds.find(number)
        attempt = round.attempt if round is not None else None
        return attempt if attempt is not None and attempt.number == attempt_number else None

    def measured(self, number: int, attempt: int, verdict: Verdict) -> None:
        """All that an attempt counts is measured: now it is folded."""
        round = self._rounds.find(number)
        current = self.attempt(number, attempt)
        if round is None or current is None:
            return
        current.verdict = verdict
        for index in range(len(current.missing)):
            self._emit(round.next(index))

    def folded(self, number: int, attempt: int, chunk: Encoded, moved: float) -> None:
        """The next chunk of an attempt is made. moved: as in `Folded`."""
        current = self.attempt(number, attempt)
        if current is None:
            return
        shipment = current.shipment
        current.moved = moved
        shipment.payload.append(chunk)
        self._rounds.stirred = self._rounds.stirred or shipment.payload.complete
        for session in self._roster if not self.withheld else ():
            self._distribution.more(session, shipment)
