"""The collection of contributions: what is done about them as they come, and when a round closes.

Rounds are committed in order, each at most once. Which are open is in `parablock.open_rounds`, what comes of each in
`parablock.uploads`, what is folded of it in `parablock.folding`; with `round.late = "fold"` one late contribution of
each client is held as well (`parablock.latecomers`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parablock.closing import entry_of, expected_of
from parablock.coordinator_events import Committed, Effect, Note, Store
from parablock.folding import Folding
from parablock.latecomers import Latecomers
from parablock.messages import Rejected
from parablock.open_rounds import OpenRounds
from parablock.quorum import Quorum
from parablock.rounds import RoundState, decide
from parablock.saved import EVERYBODY
from parablock.transfer import TransferError
from parablock.uploads import Uploads

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.agenda import Agenda
    from parablock.config import Config
    from parablock.distribution import Distribution
    from parablock.manifest import Manifest
    from parablock.messages import Abstain, Chunk, FromBroker, Keys, Offer, Shares, Unmasked
    from parablock.roster import Roster
    from parablock.rounds import Round
    from parablock.saved import Saved
    from parablock.sessions import Session
    from parablock.sums import Sums
    from parablock.transfer import Encoded
    from parablock.verdict import Verdict
    from parablock.wire import Buffer


class Collection:
    """emit: asks for an effect. due_by: a Tick is needed by then, in seconds.

    agenda: the rounds up to in_flight beyond the next one are decided. sums: where contributions are masked.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        agenda: Agenda,
        roster: Roster,
        distribution: Distribution,
        say: Callable[[bytes, FromBroker], None],
        emit: Callable[[Effect], None],
        due_by: Callable[[float], None],
        sums: Sums | None = None,
    ) -> None:
        self.hopeless = ""  # why the run cannot go on, if it cannot
        self._config = config
        self._agenda = agenda
        self._roster = roster
        self._distribution = distribution
        self._say = say
        self._emit = emit
        self._due_by = due_by
        self._sums = sums
        self._quorum = Quorum(config.round, config.quorum)
        self._begun = True  # or restored, and nothing has happened yet
        self._rounds = OpenRounds(config, agenda, roster, sums)
        self._uploads = Uploads(config, manifest, agenda, roster, self._rounds, say, emit, due_by, sums)
        self._latecomers = Latecomers(config, len(manifest.blocks), roster, self._uploads.fits, say, emit)
        self._folding = Folding(config, manifest, roster, self._rounds, self._latecomers, distribution, emit)
        # Which rounds were open when a broker before ended, and who may have given to them.
        self._seen_before: tuple[range, frozenset[str]] = range(0), frozenset()

    def restore(self, saved: Saved) -> None:
        """Go on after the last round that was committed before the broker's restart."""
        self._rounds.next, self._begun = saved.next_round, False
        open_rounds = range(saved.next_round, saved.next_round + self._config.in_flight + 1)
        self._seen_before = open_rounds, frozenset(saved.recent)
        self._rounds.tardy = set(saved.tardy)
        self._latecomers.restore(saved.folded_late)

    @property
    def next_round(self) -> int:
        """The first that is not committed."""
        return self._rounds.next

    @property
    def next_open(self) -> int:
        """The first of which anything is still taken in time: not one that is on its way to the disk."""
        at_hand = self._rounds.at_hand
        return self.next_round + (at_hand is not None and at_hand.state is RoundState.STORING)

    @property
    def complete(self) -> bool:
        """Every round is committed."""
        return self._rounds.complete

    @property
    def stirred(self) -> bool:
        """Whether something has happened since `advance` that may begin a fold or close a round."""
        return self._rounds.stirred

    def stir(self) -> None:
        """Something has happened elsewhere that may."""
        self._rounds.stirred = True

    def deadline(self, now: float) -> float | None:
        """When the round at hand must be looked at, though nothing comes: its deadline, the end of the patience with a
        quorum that is missing, an upload that makes no progress. None: not before something comes.

        What has passed was looked at, and passes only once.
        """
        dues = [self._quorum.due] if self._sums is None else [self._quorum.due, self._sums.due(now)]
        round = self._rounds.at_hand
        if round is not None:
            if self._config.round.deadline_s and round.first_done_at is not None:
                dues.append(round.first_done_at + self._config.round.deadline_s)
            later = now + self._config.network.resend_s
            dues += [due if due > now else later for due in self._uploads.stalls_at(round)]
        return min((due for due in dues if now < due < math.inf), default=None)

    # Contributions

    def offer(self, session: Session, offer: Offer, now: float) -> None:
        """Raises TransferError for one that cannot be."""
        if offer.round < self._rounds.next:
            self._latecomers.offer(session, offer, now)
        else:
            self._uploads.offer(session, offer, now)

    def chunk(self, session: Session, chunk: Chunk, payload: Buffer, now: float) -> bool:
        """Whether it is the next one of a contribution. Raises TransferError for one that cannot be."""
        if chunk.round >= self._rounds.next:
            return self._uploads.chunk(session, chunk, payload, now)
        taken, complete = self._latecomers.chunk(session, chunk, payload, now)
        self._rounds.stirred = self._rounds.stirred or complete
        return taken

    def abstain(self, session: Session, abstain: Abstain) -> None:
        """The client has nothing to give to a round."""
        self._uploads.abstain(session, abstain)

    def reclaim(self) -> None:
        """Let go of what was begun for the round at hand and makes no progress."""
        self._uploads.reclaim()

    def part_from(self, client: str) -> None:
        """The session of one that is still on the roster ends."""
        self._rounds.part_from(client)

    def withdraw(self, client: str) -> None:
        """This process of the client will not go on with what it has begun. What is complete stays."""
        self._uploads.withdraw(client)
        self._latecomers.withdraw(client)

    def sum_up(self, session: Session, message: Keys | Shares | Unmasked, payload: Buffer | None, now: float) -> None:
        """What a client says towards the sum of a round. Raises TransferError for what cannot be."""
        if self._sums is None:
            raise TransferError(f"a {type(message).__name__} in a run whose contributions are not masked")
        if self._rounds.next <= message.round <= self._rounds.farthest:  # else repeated after the round was closed
            self._sums.receive(session, message, payload, self._rounds.out(message.round), now)
            self._rounds.stirred = True

    def remind(self, session: Session) -> None:
        """Ask a client again for what a sum waits for."""
        if self._sums is not None:
            self._sums.remind(session)

    def waits(self, session: Session, round: int, now: float) -> None:
        """The client's training stands still until this round's block is there. Of a round that nobody can be at yet it
        is passed over."""
        if round > self._rounds.next + self._config.in_flight:
            return
        session.waits_for = max(round, session.waits_for)
        at_hand = self._rounds.at_hand
        if at_hand is not None and self._rounds.passed(at_hand, now):
            self._rounds.stirred = True

    # Folds

    def measured(self, number: int, attempt: int, verdict: Verdict) -> None:
        """All that an attempt counts is measured."""
        self._folding.measured(number, attempt, verdict)

    def folded(self, number: int, attempt: int, chunk: Encoded, moved: float) -> None:
        """The next chunk of an attempt is made. moved: as in `Folded`."""
        self._folding.folded(number, attempt, chunk, moved)

    def unfit(self, number: int, attempt: int, reasons: dict[str, str], now: float) -> None:
        """Contributions that must not be counted. If they are in another attempt by now, that finds it again."""
        round = self._rounds.find(number)
        current = self._folding.attempt(number, attempt)
        if round is None or current is None:
            return
        if round.state is RoundState.CLOSING:
            round.move("reopen")
        if self._sums is not None:  # whose fault it is nobody can see
            self._sums.fail(number, next(iter(reasons.values())))
            round.attempt, self._rounds.stirred = None, True
            return
        late = {each.label: each for each in current.late}
        round.attempt = None
        for part in sorted(reasons):
            if part in late:
                self._latecomers.unfit(late[part], reasons[part])
                continue
            round.refuse(part)
            self._emit(Note("rejected", part, f"round {round.number}: {reasons[part]}"))
            self._tell(part, Rejected(round.number, reasons[part]))
        if not round.done:
            round.first_done_at = None
        self._rounds.stirred = True
        self._uploads.grant_all(round, now)  # what came while the round was closed was not taken

    def stored(self, number: int, attempt: int, values: Buffer | None, now: float) -> None:
        """The round's entry is durable, and what the attempt has made."""
        round = self._rounds.round(number)
        assert round.state is RoundState.STORING
        assert (round.attempt.number if round.attempt is not None else 0) == attempt
        assert (values is None) == (attempt == 0)
        self._commit(round, values, now)

    def advance(self, now: float) -> None:
        """Begin to fold what can be folded, and close what can close."""
        self._rounds.stirred = False
        if self.complete:
            return
        round = self._rounds.round(self._rounds.next)
        if self._sums is not None:
            self._sums.look(self._rounds.out, now)
            self._due_by(self._sums.due(now))
        if round.state is RoundState.OPEN and not self._close(round, now):
            return
        if round.state is RoundState.CLOSING and self._sums is not None:
            self._fold_sums(self._sums, round, now)
        if round.state is RoundState.CLOSING and (round.attempt is None or round.attempt.complete):
            self._store(round)

    def _close(self, round: Round, now: float) -> bool:
        """Whether an open round closes now."""
        members, present = self._rounds.members(round), self._roster.present()
        if not self._begun:
            self._begun = True
            self._quorum.expect(now + self._config.network.timeout_s)
        changed = self._quorum.look(len(present | members | round.done), now)
        if changed is not None:
            self._emit(Note("quorum", "", f"round {round.number}: {changed}", told=self._quorum.told))
        if self._quorum.given_up and self._config.round.quorum_lost == "stop":
            self.hopeless = f"round {round.number}: {changed}"
            return False
        self._due_by(self._quorum.due)
        policy = self._config.round
        standing = self._standing(round) if self._rounds.passed(round, now) else frozenset()
        least = self._sums.needed(round.number) if self._sums is not None else 0
        decision = decide(round, members, present, self._quorum, policy, now, standing, least)
        if not decision.close and self._sums is not None:
            self._sums.name(round, (members | round.done) - round.out, now)
            self._fold_sums(self._sums, round, now)
            return False
        if not decision.close:
            expected = expected_of(round, members, self._rounds.tardy, policy, self._config.quorum, now)
            if expected:
                self._folding.begin(round, expected, now)
            return False
        round.move("close")
        round.why = decision.reason
        counted = tuple(sorted(round.done))
        if self._sums is not None:
            if self._sums.settle(round, now) is None and round.attempt is None:
                self._folding.begin_sum(round, now)
            return True
        reason = self._config.robust.too_few(len(counted), len(round.unfit))
        if counted and reason is not None:
            round.why += f"; {reason}"
            round.left_out = dict.fromkeys(counted, reason)
            counted = ()
        if not counted:
            round.attempt = None
        else:
            self._folding.begin(round, counted, now)
        return True

    def _fold_sums(self, sums: Sums, round: Round, now: float) -> None:
        self._due_by(sums.due(now))
        self._folding.unmasked(sums, round, now)

    def _standing(self, round: Round) -> frozenset[str]:
        """Whose training stands still until the round's block is there, be it that of one who begins with a later
        round: if those who take part in this one do not come, nobody else would end its grace."""
        return frozenset(session.name for session in self._roster.active() if session.waits_for >= round.number)

    def _store(self, round: Round) -> None:
        """All is folded, for good, and the disk may take its time: settle what is to be said of the round."""
        round.move("store")
        attempt = round.attempt
        for name, upload in round.uploads.items():
            if self._config.round.late == "discard" or (attempt is not None and name in attempt.clients):
                upload.pieces.clear()
        for late in attempt.late if attempt is not None else ():
            late.upload.pieces.clear()
        nbytes_up = sum(upload.incoming.held for upload in round.uploads.values())
        if attempt is not None:
            round.left_out = attempt.left_out
        round.settle_left_out()
        counted = attempt.counted if attempt is not None else ()
        here, members = self._roster.members(round.number), self._rounds.members(round)
        self._rounds.tardy = (self._rounds.tardy & (here - members)) | (members - set(counted) - round.out)
        if attempt is not None:
            self._agenda.moved(round.number, round.block, attempt.moved)
        charged = self._charged(round, counted)
        self._agenda.gave(round.number, charged)
        self._agenda.decide(round.number + self._config.in_flight + 1, self._roster.present())
        for text in self._agenda.take_short():
            self._emit(Note("drawn", "", text))
        came_late, late_bytes = self._latecomers.take_counts()
        round.entry = entry_of(
            round,
            base=self._distribution.base(round.block),
            tells_losses=not self._config.privacy.local,
            late=len(round.uploads.keys() - set(counted)) + came_late,
            nbytes_up=nbytes_up + late_bytes,
            receivers=len(self._roster.active()),
            agenda=self._agenda.snapshot(),
            clients=tuple(self._roster.clients),
            tardy=tuple(sorted(self._rounds.tardy)),
            charged=charged,
        )
        self._emit(Store(round.number, round.block, round.entry.attempt, round.entry))

    def _commit(self, round: Round, values: Buffer | None, now: float) -> None:
        """It is durable: announce it."""
        round.move("commit")
        entry, attempt = round.entry, round.attempt
        assert entry is not None
        if values is not None and attempt is not None:
            shipment = attempt.shipment
            self._distribution.keep(shipment, entry.counted, values)
        else:
            shipment = self._distribution.nothing(round.number, round.block)
        for name, reason in round.left_out.items():
            self._tell(name, Rejected(round.number, reason))
            self._emit(Note("uncounted", name, f"round {round.number}: {reason}"))
        self._latecomers.settle(round, self._rounds.members(round), entry.counted)
        ahead_s = round.ahead_s(entry.contributors)
        for session in self._roster.active():
            turns = self._agenda.turns(round.number + self._config.in_flight + 1, session.name)
            if self._folding.withheld:
                self._distribution.ship(session, shipment, now)
            waited_s = ahead_s.get(session.name, 0.0)
            self._distribution.announce(session, shipment, entry.base, entry.counted, now, turns, waited_s)
            if self._folding.withheld:
                self._distribution.more(session, shipment)
        self._emit(
            Committed(
                round.number,
                round.block,
                entry.contributors,
                entry.late,
                entry.loss,
                entry.bytes_up,
                entry.bytes_down,
                entry.reason,
                entry.folded_late,
                entry.left_out,
                entry.clipped,
                entry.charged,
            )
        )
        self._rounds.close(round.number)
        if self._sums is not None:
            self._sums.close(round.number)
        at_hand = self._rounds.at_hand
        if at_hand is not None:
            self._uploads.resume(at_hand, now)
            due = self.deadline(now)
            if due is not None:
                self._due_by(due)

    def _charged(self, round: Round, counted: tuple[str, ...]) -> tuple[str, ...]:
        """Whose data the round costs something: who has a part in what the broker tells; or, where clients hide from
        the broker too, of whom something has come, be it to a broker before, or may be on its way."""
        if self._config.privacy.local:
            before = self._given_before(round.number)
            names = round.began | self._rounds.members(round) | before
            return (EVERYBODY,) if EVERYBODY in before else tuple(sorted(names))
        return counted if self._config.privacy.central else ()

    def _given_before(self, number: int) -> frozenset[str]:
        """Who may have given to a round while a broker before had it open."""
        rounds, clients = self._seen_before
        if number not in rounds:
            return frozenset()
        asked = self._agenda.asked(number)
        if asked is not None and clients != {EVERYBODY}:
            return asked
        return clients if EVERYBODY in clients else self._agenda.members(number, clients)

    def _tell(self, client: str, message: FromBroker) -> None:
        for session in self._roster.active():
            if session.name == client:
                self._say(session.peer, message)
