"""The uploads: what comes of contributions to the open rounds, within its credit, and who has nothing to give.

A contribution to a later round than the next may begin to come; all of it comes when its turn has come, so that no more
than the roster's contributions to one round are held, and a window each. What is folded of them is in
`parablock.folding`, what comes of rounds that are closed in `parablock.latecomers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.coordinator_events import LONGEST_QUOTE, Effect, Note
from parablock.layout import Layout
from parablock.messages import Credit, Rejected
from parablock.rounds import RoundState, Upload
from parablock.secure_settings import most_tokens
from parablock.transfer import Incoming, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.agenda import Agenda
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import Abstain, Chunk, FromBroker, Offer
    from parablock.open_rounds import OpenRounds
    from parablock.roster import Roster
    from parablock.rounds import Round
    from parablock.sessions import Session
    from parablock.sums import Sums
    from parablock.wire import Buffer


class Uploads:
    """say: sends a message. emit: asks for an effect. due_by: a Tick is needed by then, in seconds.

    sums: where contributions are masked.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        agenda: Agenda,
        roster: Roster,
        rounds: OpenRounds,
        say: Callable[[bytes, FromBroker], None],
        emit: Callable[[Effect], None],
        due_by: Callable[[float], None],
        sums: Sums | None,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._agenda = agenda
        self._roster = roster
        self._rounds = rounds
        self._say = say
        self._emit = emit
        self._due_by = due_by
        self._sums = sums

    def offer(self, session: Session, offer: Offer, now: float) -> None:
        """To a round that is open. Raises TransferError for one that cannot be."""
        assert session.start is not None
        if offer.round > self._rounds.farthest:
            raise TransferError(f"a contribution to round {offer.round} while round {self._rounds.next} is open")
        round = self._rounds.round(offer.round)
        layout = self.fits(offer, round.block)
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
            round.began.add(session.name)  # its first chunks left with the offer
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
            ahead = offer.round > self._rounds.next  # takes its first window now, the rest when its turn has come
            incoming = Incoming(offer.nbytes, layout.chunk_bytes, window, paused=ahead)
            upload = Upload(session.token, offer, incoming, now)
            round.begin(session.name, upload)
            self._rounds.stirred = True
        elif upload.offer != offer:
            raise TransferError(f"a second, different contribution to round {offer.round}")
        self._grant(session.peer, upload, now)

    def fits(self, offer: Offer, block: int) -> Layout:
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
        """Of a round that is open. Whether it is the next one of a contribution.

        Raises TransferError for one that cannot be.
        """
        round = self._rounds.find(chunk.round)
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
            self._rounds.stirred = self._rounds.stirred or self._sums is not None
            if round.attempt is not None and round.attempt.take(session.name, len(upload.pieces) - 1):
                self._emit(round.next(len(upload.pieces) - 1))
        if not taken or upload.incoming.owes_grant(now):
            self._grant(session.peer, upload, now)
        return taken

    def _done(self, round: Round, client: str, now: float) -> None:
        """A contribution is complete."""
        round.done.add(client)
        round.uploads[client].done_at = now
        deadline_s = self._config.round.deadline_s
        if round.first_done_at is None:
            round.first_done_at = now
            if deadline_s and round.number == self._rounds.next:
                self._due_by(now + deadline_s)
        passed = self._rounds.passed(round, now)
        answered = len(round.done) + len(round.out) >= len(self._rounds.members(round))
        if passed or answered or client in self._rounds.tardy:  # a late one was not expected
            self._rounds.stirred = True  # else nobody need look

    def abstain(self, session: Session, abstain: Abstain) -> None:
        if not self._rounds.next <= abstain.round <= self._rounds.farthest:
            return  # repeated after the round was closed
        if not self._agenda.trains(abstain.round, session.name):
            return  # nobody waits for it
        round = self._rounds.round(abstain.round)
        if round.state is RoundState.OPEN and session.name not in round.out | round.done:
            if session.name in round.uploads:
                round.drop(session.name)
            round.out.add(session.name)
            self._emit(Note("abstained", session.name, f"round {abstain.round}: {abstain.reason[:LONGEST_QUOTE]}"))
            self._rounds.stirred = True

    def reclaim(self) -> None:
        """Let go of what was begun for the round at hand by a client that is heard, and does not go on with it.

        Nobody waits for that any more, and what it held is free. A client that is not heard at all is lost, sooner.
        """
        round = self._rounds.at_hand
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
        for round in self._rounds.all():
            if client in round.uploads and client not in round.done:
                round.drop(client)

    def resume(self, round: Round, now: float) -> None:
        """Its turn has come: contributions that are ahead of it may come whole."""
        for upload in round.uploads.values():  # also of clients that are away just now
            upload.incoming.paused = False
            upload.progress_at = now
        self.grant_all(round, now)

    def grant_all(self, round: Round, now: float) -> None:
        """Let every contribution that is under way go on."""
        for session, upload in self._under_way(round):
            upload.progress_at = now
            self._grant(session.peer, upload, now)

    def stalls_at(self, round: Round) -> list[float]:
        """When each upload to an open round will have made no progress for too long, if its sender is heard by then."""
        if round.state is not RoundState.OPEN:
            return []
        return [self._stalls_at(session, upload) for session, upload in self._under_way(round)]

    def _under_way(self, round: Round) -> list[tuple[Session, Upload]]:
        """What live clients have begun to send, and not sent all of."""
        found = [(session, round.uploads.get(session.name)) for session in self._roster]
        return [
            (session, upload)
            for session, upload in found
            if upload is not None and upload.session == session.token and not upload.incoming.done
        ]

    def _stalls_at(self, session: Session, upload: Upload) -> float:
        return max(upload.progress_at, session.since) + self._config.network.timeout_s

    def _grant(self, peer: bytes, upload: Upload, now: float) -> None:
        self._say(peer, Credit(upload.offer.round, upload.offer.block, 0, *upload.incoming.grant(now)))
