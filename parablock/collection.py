"""The collection of contributions: the rounds that are open, what has come of each, and what is folded of it.

Aggregation cuts through: chunk c of the new block is folded and leaves as soon as chunk c is in from everybody who is
expected to count (`parablock.rounds.Attempt`), so that the way down begins while the way up goes on; or it is measured
then, where all of each contribution must be seen before any is folded (`parablock.verdict`). Rounds are
committed in order, each at most once. A contribution to a later round than the next may begin to come; all of it comes
when its turn has come, so that no more than the roster's contributions to one round are held, and a window each; with
`round.late = "fold"` also one late contribution of each client (`parablock.late`).

Where the broker adds noise (`privacy.where = "central"`), nothing of a block leaves before its round is durable: what
is folded anew, after a change of mind or a restart, has other noise, and both together would tell more than one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parablock.closing import entry_of, expected_of, passed
from parablock.coordinator_events import LONGEST_QUOTE, Committed, Effect, Note, Store
from parablock.latecomers import Latecomers
from parablock.layout import Layout
from parablock.messages import Credit, Rejected
from parablock.quorum import Quorum
from parablock.rounds import Attempt, Round, RoundState, Upload, decide
from parablock.secure_settings import most_tokens
from parablock.transfer import Incoming, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.agenda import Agenda
    from parablock.config import Config
    from parablock.distribution import Distribution
    from parablock.late import Late
    from parablock.manifest import Manifest
    from parablock.messages import Abstain, Chunk, FromBroker, Keys, Offer, Shares, Unmasked
    from parablock.roster import Roster
    from parablock.saved import Saved
    from parablock.sessions import Session
    from parablock.sums import Sums
    from parablock.transfer import Encoded
    from parablock.verdict import Verdict
    from parablock.wire import Buffer


class Collection:
    """emit: asks for an effect. due_by: a Tick is needed by then, in seconds.

    stirred: something has happened since `advance` that may begin a fold or close a round. agenda: the rounds up to
    in_flight beyond the next one are decided. sums: where contributions are masked.
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
        self.next_round = 0  # the first that is not committed
        self.stirred = False
        self.hopeless = ""  # why the run cannot go on, if it cannot
        self._config = config
        self._withheld = config.privacy.central  # a block does not leave before its round is durable
        self._manifest = manifest
        self._agenda = agenda
        self._roster = roster
        self._distribution = distribution
        self._say = say
        self._emit = emit
        self._due_by = due_by
        self._sums = sums
        self._rounds: dict[int, Round] = {}
        self._quorum = Quorum(config.round, config.quorum)
        self._latecomers = Latecomers(config, len(manifest.blocks), roster, self._fits, say, emit)
        self._late: set[str] = set()  # were not in time for their last round; nobody's chunks wait for them
        # Which rounds were open when a broker before ended, and who took part then.
        self._seen_before: tuple[range, frozenset[str]] = range(0), frozenset()

    def restore(self, saved: Saved) -> None:
        """Go on after the last round that was committed before the broker's restart."""
        self.next_round = saved.next_round
        open_rounds = range(saved.next_round, saved.next_round + self._config.in_flight + 1)
        self._seen_before = open_rounds, frozenset(saved.clients)
        self._late = set(saved.tardy)
        self._latecomers.restore(saved.folded_late)

    @property
    def complete(self) -> bool:
        """Every round is committed."""
        return self.next_round == self._config.rounds

    def deadline(self, now: float) -> float | None:
        """When the round at hand must be looked at, though nothing comes: its deadline, the end of the patience with a
        quorum that is missing, an upload that makes no progress. None: not before something comes.

        What has passed was looked at, and passes only once.
        """
        dues = [self._quorum.due] if self._sums is None else [self._quorum.due, self._sums.due(now)]
        round = self._rounds.get(self.next_round)
        if round is not None:
            if self._config.round.deadline_s and round.first_done_at is not None:
                dues.append(round.first_done_at + self._config.round.deadline_s)
            for session, upload in self._under_way(round) if round.state is RoundState.OPEN else ():
                due = self._stalls_at(session, upload)
                dues.append(due if due > now else now + self._config.network.resend_s)
        return min((due for due in dues if now < due < math.inf), default=None)

    # Contributions

    def offer(self, session: Session, offer: Offer, now: float) -> None:
        """Raises TransferError for one that cannot be."""
        assert session.start is not None
        if offer.round < self.next_round:
            self._latecomers.offer(session, offer, now)
            return
        if offer.round > self.next_round + self._config.in_flight or offer.round >= self._config.rounds:
            raise TransferError(f"a contribution to round {offer.round} while round {self.next_round} is open")
        round = self._round(offer.round)
        layout = self._fits(offer, round.block)
        upload = round.uploads.get(session.name)
        resumed = upload is not None and upload.session == session.token
        reason = None
        if session.name in round.out:
            reason = "the client has abstained, or its contribution was refused before"
        elif not resumed and offer.round < session.start.round:
            reason = f"the client takes part from round {session.start.round} on"
        elif not resumed and not self._agenda.trains(offer.round, session.name):
            reason = "the client was not drawn for this round"
        if reason is not None:
            self._say(session.peer, Rejected(offer.round, reason))
            return
        if round.state is not RoundState.OPEN:
            return  # the commit will say that it is closed; if it is opened again, the offer will be repeated
        if self._sums is not None and not self._sums.admits(session, round.number):
            return
        if not resumed and session.name in round.done:  # an earlier process of this name has sent one: that counts
            self._say(session.peer, Credit(offer.round, offer.block, 0, offer.nbytes, offer.nbytes))
            return
        if upload is None or not resumed:
            window = layout.window_bytes(self._config)
            ahead = offer.round > self.next_round  # takes its first window now, the rest when its turn has come
            incoming = Incoming(offer.nbytes, layout.chunk_bytes, window, paused=ahead)
            upload = Upload(session.token, offer, incoming, now)
            round.begin(session.name, upload)
            self.stirred = True
        elif upload.offer != offer:
            raise TransferError(f"a second, different contribution to round {offer.round}")
        self._grant(session.peer, upload, now)

    def _fits(self, offer: Offer, block: int) -> Layout:
        """How a contribution to a round of `block` is laid out. Raises TransferError for one that is not of such."""
        layout = Layout.up(self._config, self._manifest.blocks[block].numel)
        if (offer.block, offer.nbytes) != (block, layout.nbytes):
            raise TransferError(
                f"round {offer.round} trains block {block} of {layout.nbytes} bytes; "
                f"got block {offer.block} of {offer.nbytes} bytes"
            )
        fewest, most = self._config.solver.step_bounds
        if self._config.secure.enabled and offer.weight > (tokens := most_tokens(self._config)):
            raise TransferError(f"a round takes {tokens} tokens at most; got {offer.weight}")
        if not fewest <= offer.steps <= most:  # where steps count in the mean, others' shares depend on them
            raise TransferError(f"a round takes {fewest} to {most} optimizer steps; got {offer.steps}")
        return layout

    def chunk(self, session: Session, chunk: Chunk, payload: Buffer, now: float) -> bool:
        """Whether it is the next one of a contribution. Raises TransferError for one that cannot be."""
        if chunk.round < self.next_round:
            taken, complete = self._latecomers.chunk(session, chunk, payload, now)
            self.stirred = self.stirred or complete
            return taken
        round = self._rounds.get(chunk.round)
        upload = round.uploads.get(session.name) if round is not None else None
        if round is None or upload is None or upload.session != session.token or chunk.block != round.block:
            return False  # of a closed round, or its offer was lost: the sender hears of the one, repeats the other
        if round.state is not RoundState.OPEN:
            return False  # who counts is settled
        taken = upload.incoming.take(chunk.offset, payload)
        if taken:
            upload.pieces.append(payload)
            upload.progress_at = now
            if upload.incoming.done:
                self._done(round, session.name, now)
            self.stirred = self.stirred or self._sums is not None
            if round.attempt is not None and round.attempt.take(session.name, len(upload.pieces) - 1):
                self._emit(round.next(len(upload.pieces) - 1))
        if not taken or upload.incoming.owes_grant(now):
            self._grant(session.peer, upload, now)
        return taken

    def abstain(self, session: Session, abstain: Abstain) -> None:
        last = min(self.next_round + self._config.in_flight, self._config.rounds - 1)
        if not self.next_round <= abstain.round <= last:
            return  # repeated after the round was closed
        if not self._agenda.trains(abstain.round, session.name):
            return  # nobody waits for it
        round = self._round(abstain.round)
        if round.state is RoundState.OPEN and session.name not in round.out | round.done:
            if session.name in round.uploads:
                round.drop(session.name)
            round.out.add(session.name)
            self._emit(Note("abstained", session.name, f"round {abstain.round}: {abstain.reason[:LONGEST_QUOTE]}"))
            self.stirred = True

    def sum_up(self, session: Session, message: Keys | Shares | Unmasked, payload: Buffer | None, now: float) -> None:
        """What a client says towards the sum of a round. Raises TransferError for what cannot be."""
        if self._sums is None:
            raise TransferError(f"a {type(message).__name__} in a run whose contributions are not masked")
        last = min(self.next_round + self._config.in_flight, self._config.rounds - 1)
        if self.next_round <= message.round <= last:  # else it was repeated after the round was closed
            self._sums.receive(session, message, payload, self._out(message.round), now)
            self.stirred = True

    def remind(self, session: Session) -> None:
        """Ask a client again for what a sum waits for."""
        if self._sums is not None:
            self._sums.remind(session)

    def waits(self, session: Session, round: int, now: float) -> None:
        """The client's training stands still until this round's block is there. Of a round that nobody can be at yet it
        is passed over."""
        if round > self.next_round + self._config.in_flight:
            return
        session.waits_for = max(round, session.waits_for)
        at_hand = self._rounds.get(self.next_round)
        if at_hand is not None and self._passed(at_hand, now):
            self.stirred = True

    def reclaim(self) -> None:
        """Let go of what was begun for the round at hand by a client that is heard, and does not go on with it.

        Nobody waits for that any more, and what it held is free. A client that is not heard at all is lost, sooner.
        """
        round = self._rounds.get(self.next_round)
        if round is None or round.state is not RoundState.OPEN:
            return
        for session, upload in self._under_way(round):
            if session.heard_at >= self._stalls_at(session, upload):
                reason = f"nothing more of the contribution came for {self._config.network.timeout_s:g} s"
                round.drop(session.name)
                round.out.add(session.name)
                self._emit(Note("stalled", session.name, f"round {round.number}: {reason}"))
                self._say(session.peer, Rejected(round.number, reason))

    def withdraw(self, client: str) -> None:
        """This process of the client will not go on with what it has begun. What is complete stays."""
        for round in self._rounds.values():
            if client in round.uploads and client not in round.done:
                round.drop(client)
        self._latecomers.withdraw(client)

    # Folds

    def measured(self, number: int, attempt: int, verdict: Verdict) -> None:
        """All that an attempt counts is measured: now it is folded."""
        round = self._rounds.get(number)
        current = self._attempt(round, attempt)
        if round is None or current is None:
            return
        current.verdict = verdict
        for index in range(len(current.missing)):
            self._emit(round.next(index))

    def folded(self, number: int, attempt: int, chunk: Encoded, moved: float) -> None:
        """The next chunk of an attempt is made. moved: as in `Folded`."""
        current = self._attempt(self._rounds.get(number), attempt)
        if current is None:
            return
        shipment = current.shipment
        current.moved = moved
        shipment.payload.append(chunk)
        self.stirred = self.stirred or shipment.payload.complete
        for session in self._roster if not self._withheld else ():
            self._distribution.more(session, shipment)

    def unfit(self, number: int, attempt: int, reasons: dict[str, str], now: float) -> None:
        """Contributions that must not be counted. If they are in another attempt by now, that finds it again."""
        round = self._rounds.get(number)
        current = self._attempt(round, attempt)
        if round is None or current is None:
            return
        if round.state is RoundState.CLOSING:
            round.move("reopen")
        if self._sums is not None:  # whose fault it is nobody can see
            self._sums.fail(number, next(iter(reasons.values())))
            round.attempt, self.stirred = None, True
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
        self.stirred = True
        self._grant_all(round, now)  # what came while the round was closed was not taken

    def stored(self, number: int, attempt: int, values: Buffer | None, now: float) -> None:
        """The round's entry is durable, and what the attempt has made."""
        round = self._rounds[number]
        assert round.state is RoundState.STORING
        assert (round.attempt.number if round.attempt is not None else 0) == attempt
        assert (values is None) == (attempt == 0)
        self._commit(round, values, now)

    def advance(self, now: float) -> None:
        """Begin to fold what can be folded, and close what can close."""
        self.stirred = False
        if self.complete:
            return
        round = self._round(self.next_round)
        if self._sums is not None:
            self._sums.look(self._out, now)
            self._due_by(self._sums.due(now))
        if round.state is RoundState.OPEN and not self._close(round, now):
            return
        if round.state is RoundState.CLOSING and self._sums is not None:
            self._fold_sums(self._sums, round, now)
        if round.state is RoundState.CLOSING and (round.attempt is None or round.attempt.complete):
            self._store(round)

    def _close(self, round: Round, now: float) -> bool:
        """Whether an open round closes now."""
        members, present = self._members(round), self._roster.present()
        changed = self._quorum.look(len(present | members | round.done), now)
        if changed is not None:
            self._emit(Note("quorum", "", f"round {round.number}: {changed}", told=self._quorum.told))
        if self._quorum.given_up and self._config.round.quorum_lost == "stop":
            self.hopeless = f"round {round.number}: {changed}"
            return False
        self._due_by(self._quorum.due)
        policy = self._config.round
        standing = self._standing(round) if self._passed(round, now) else frozenset()
        least = self._sums.needed(round.number) if self._sums is not None else 0
        decision = decide(round, members, present, self._quorum, policy, now, standing, least)
        if not decision.close and self._sums is not None:
            self._sums.name(round, (members | round.done) - round.out, now)
            self._fold_sums(self._sums, round, now)
            return False
        if not decision.close:
            expected = expected_of(round, members, self._late, policy, self._config.quorum, now)
            if expected:
                self._begin(round, expected, now)
            return False
        round.move("close")
        round.why = decision.reason
        counted = tuple(sorted(round.done))
        if self._sums is not None:
            if self._sums.settle(round, now) is None and round.attempt is None:
                self._ship(round, (), (), [], now)
            return True
        reason = self._config.robust.too_few(len(counted), len(round.unfit))
        if counted and reason is not None:
            round.why += f"; {reason}"
            round.left_out = dict.fromkeys(counted, reason)
            counted = ()
        if not counted:
            round.attempt = None
        else:
            self._begin(round, counted, now)
        return True

    def _standing(self, round: Round) -> frozenset[str]:
        """Whose training stands still until the round's block is there, be it that of one who begins with a later
        round: if those who take part in this one do not come, nobody else would end its grace."""
        return frozenset(session.name for session in self._roster.active() if session.waits_for >= round.number)

    def _passed(self, round: Round, now: float) -> bool:
        return passed(round, self._config.round, now)

    def _begin(self, round: Round, clients: tuple[str, ...], now: float) -> None:
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

    def _ship(
        self, round: Round, clients: tuple[str, ...], late: tuple[Late, ...], missing: list[int], now: float
    ) -> None:
        """Begin an attempt: every active session is sent what comes of it."""
        round.attempts += 1
        shipment = self._distribution.shipment(round.number, round.block, round.attempts)
        bad = self._config.robust.still_bad(len(round.unfit))
        round.attempt = Attempt(clients, late, missing, shipment, self._config.measured, bad)
        if not self._withheld:
            for session in self._roster.active():
                self._distribution.ship(session, shipment, now)

    def _fold_sums(self, sums: Sums, round: Round, now: float) -> None:
        """Fold the slices that can be unmasked. Whom the attempt counts is known when all of them are settled."""
        self._due_by(sums.due(now))
        if (failure := sums.failure(round.number)) is not None:
            if round.state is RoundState.CLOSING:
                round.why += f"; nothing is counted: {failure}"
            round.attempt = None
            return
        for fold in sums.folds(round, round.attempts or 1):
            if round.attempt is None:
                self._ship(round, (), (), [], now)
            self._emit(fold)
        if round.state is RoundState.CLOSING and round.attempt is not None:
            round.attempt.clients = sums.contributors(round.number)

    def _out(self, number: int) -> set[str]:
        """Who does not contribute to a round."""
        return self._rounds[number].out if number in self._rounds else set()

    @staticmethod
    def _attempt(round: Round | None, number: int) -> Attempt | None:
        """What an answer is about; None if that attempt was given up."""
        attempt = round.attempt if round is not None else None
        return attempt if attempt is not None and attempt.number == number else None

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
        here, members = self._roster.members(round.number), self._members(round)
        self._late = (self._late & (here - members)) | (members - set(counted) - round.out)
        if attempt is not None:
            self._agenda.moved(round.number, round.block, attempt.moved)
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
            tardy=tuple(sorted(self._late)),
            charged=self._charged(round, counted),
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
        self._latecomers.settle(round, self._members(round), entry.counted)
        for session in self._roster.active():
            turns = self._agenda.turns(round.number + self._config.in_flight + 1, session.name)
            if self._withheld:
                self._distribution.ship(session, shipment, now)
            self._distribution.announce(session, shipment, entry.base, entry.counted, now, turns)
            if self._withheld:
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
        del self._rounds[round.number]
        if self._sums is not None:
            self._sums.close(round.number)
        self.next_round = round.number + 1
        self.stirred = True
        if self.next_round in self._rounds:
            self._resume(self._rounds[self.next_round], now)

    def _resume(self, round: Round, now: float) -> None:
        """Its turn has come: contributions that are ahead of it may come whole."""
        for upload in round.uploads.values():  # also of clients that are away just now
            upload.incoming.paused = False
            upload.progress_at = now
        self._grant_all(round, now)
        due = self.deadline(now)
        if due is not None:
            self._due_by(due)

    def _charged(self, round: Round, counted: tuple[str, ...]) -> tuple[str, ...]:
        """Whose data the round costs something: who has a part in what the broker tells; or, where clients hide from
        the broker too, of whom something has come, be it to a broker before, or may be on its way."""
        if self._config.privacy.local:
            rounds, clients = self._seen_before
            before = self._agenda.members(round.number, clients) if round.number in rounds else frozenset()
            return tuple(sorted(round.began | self._members(round) | before))
        return counted if self._config.privacy.central else ()

    def _done(self, round: Round, client: str, now: float) -> None:
        """A contribution is complete."""
        round.done.add(client)
        deadline_s = self._config.round.deadline_s
        if round.first_done_at is None:
            round.first_done_at = now
            if deadline_s and round.number == self.next_round:
                self._due_by(now + deadline_s)
        passed = self._passed(round, now)
        answered = len(round.done) + len(round.out) >= len(self._members(round))
        if passed or answered or client in self._late:  # a late one was not expected
            self.stirred = True  # else nobody need look

    def _grant_all(self, round: Round, now: float) -> None:
        """Let every contribution that is under way go on."""
        for session, upload in self._under_way(round):
            upload.progress_at = now
            self._grant(session.peer, upload, now)

    def _under_way(self, round: Round) -> list[tuple[Session, Upload]]:
        """What live clients have begun to send, and not sent all of."""
        found = [(session, round.uploads.get(session.name)) for session in self._roster]
        return [
            (session, upload)
            for session, upload in found
            if upload is not None and upload.session == session.token and not upload.incoming.done
        ]

    def _stalls_at(self, session: Session, upload: Upload) -> float:
        """When an upload will have made no progress for too long, if its sender is heard from by then."""
        return max(upload.progress_at, session.since) + self._config.network.timeout_s

    def _grant(self, peer: bytes, upload: Upload, now: float) -> None:
        self._say(peer, Credit(upload.offer.round, upload.offer.block, 0, *upload.incoming.grant(now)))

    def _tell(self, client: str, message: FromBroker) -> None:
        for session in self._roster.active():
            if session.name == client:
                self._say(session.peer, message)

    def _round(self, number: int) -> Round:
        if number not in self._rounds:
            self._rounds[number] = Round(number, self._agenda.block(number))
        return self._rounds[number]

    def _members(self, round: Round) -> frozenset[str]:
        """Live clients that shall contribute to a round."""
        members = self._agenda.members(round.number, self._roster.members(round.number))
        return members if self._sums is None else self._sums.members(round.number, members)
