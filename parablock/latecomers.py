"""Latecomers: what the broker does about contributions that have missed their round, and what it says of them.

Who is owed and what is held of them is in `parablock.late`, how they count in `parablock.rounds.Attempt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.coordinator_events import Note
from parablock.late import LateContributions
from parablock.messages import Credit, Late, Rejected
from parablock.rounds import Upload
from parablock.transfer import Incoming, TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Set as AbstractSet

    from parablock import late
    from parablock.config import Config
    from parablock.layout import Layout
    from parablock.messages import Chunk, FromBroker, Offer
    from parablock.roster import Roster
    from parablock.rounds import Round
    from parablock.sessions import Session
    from parablock.wire import Buffer


class Latecomers:
    """fits: how an offer for a block is laid out, or TransferError. say: sends a message. emit: asks for an effect."""

    def __init__(
        self,
        config: Config,
        num_blocks: int,
        roster: Roster,
        fits: Callable[[Offer, int], Layout],
        say: Callable[[bytes, FromBroker], None],
        emit: Callable[[Note], None],
    ) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._roster = roster
        self._fits = fits
        self._say = say
        self._emit = emit
        self._late = LateContributions()
        self._came = 0  # contributions to closed rounds that were offered since the last commit
        self._bytes = 0  # that came of those since

    def restore(self, counted: Mapping[str, tuple[int, int]]) -> None:
        """Tell again what has counted late before the broker's restart. counted: as `Saved.folded_late`."""
        self._late.restore(counted)

    def ready(self, block: int) -> tuple[late.Late, ...]:
        """What is complete of this block, in the order of the roster."""
        return self._late.ready(block)

    def take_counts(self) -> tuple[int, int]:
        """Contributions that were offered after the close of their round, and bytes of such, since last asked."""
        counts, self._came, self._bytes = (self._came, self._bytes), 0, 0
        return counts

    def withdraw(self, client: str) -> None:
        """This process of the client will not go on with what it has begun. What is complete stays."""
        held = self._late.held(client)
        if held is not None and not held.upload.incoming.done:
            self._late.drop(held)

    def unfit(self, late: late.Late, reason: str) -> None:
        """It must not be counted."""
        self._late.drop(late)
        self._emit(Note("rejected", late.client, f"round {late.round}: {reason}"))
        self._tell(late.client, Rejected(late.round, reason))

    def offer(self, session: Session, offer: Offer, now: float) -> None:
        """To a round that is closed. Raises TransferError for one that cannot be."""
        name, held = session.name, self._late.held(session.name)
        into = self._late.counted_in(name, offer.round)
        if into is not None:
            self._say(session.peer, Late(offer.round, into))
            return
        mine = held is not None and held.upload.session == session.token
        if held is not None and held.round == offer.round:
            if mine and held.upload.offer != offer:
                raise TransferError(f"a second, different contribution to round {offer.round}")
            if not mine and not held.upload.incoming.done:  # nobody goes on with what an earlier process has begun
                held.upload = self._begin(session, offer, now)
            self._say(session.peer, Late(offer.round, -1))
            self._grant(session.peer, held.upload, now)
            return
        if not mine:
            self.withdraw(name)
        missed = self._late.claim(name, offer.block, offer.round)
        if missed is None:
            if offer.round not in session.downloads:  # else the commit is on its way, and says what became of it
                self._say(session.peer, Rejected(offer.round, "the round was closed before the contribution came"))
            return
        upload = self._begin(session, offer, now)
        self._came += 1
        reason = self._hold(name, upload, missed)
        if reason is not None:
            self._say(session.peer, Rejected(offer.round, reason))
            return
        self._say(session.peer, Late(offer.round, -1))
        self._grant(session.peer, upload, now)

    def _begin(self, session: Session, offer: Offer, now: float) -> Upload:
        layout = self._fits(offer, offer.block)
        incoming = Incoming(offer.nbytes, layout.chunk_bytes, self._config.network.window_bytes)
        return Upload(session.token, offer, incoming, now)

    def _hold(self, client: str, upload: Upload, missed: int) -> str | None:
        """Keep a contribution that missed its round for the next one of its block, or say why not."""
        offer, held, reason = upload.offer, self._late.held(client), None
        if self._config.round.late == "discard":
            reason = "the round was closed before the contribution came"
        elif held is not None:
            reason = f"one late contribution of each client is kept, and that to round {held.round} is"
        elif self._num_blocks > 1 and self._late.has_part(client, offer.round):
            reason = "one that was late before has counted in that round; it is the next block's turn"
        else:
            self._late.hold(client, upload, missed)
        then = f"may count in the next round of block {offer.block}" if reason is None else f"not counted: {reason}"
        self._emit(Note("late", client, f"round {offer.round}: {then}"))
        return reason

    def chunk(self, session: Session, chunk: Chunk, payload: Buffer, now: float) -> tuple[bool, bool]:
        """Of a round that is closed. Whether it is the next one of a contribution, and whether that is complete now.

        Raises TransferError for one that cannot be.
        """
        held = self._late.held(session.name)
        if held is None or held.upload.session != session.token:
            return False, False
        upload = held.upload
        if (held.round, upload.offer.block) != (chunk.round, chunk.block):
            return False, False
        taken = upload.incoming.take(chunk.offset, payload)
        if taken:
            upload.pieces.append(payload)
            self._bytes += payload.nbytes
        if not taken or upload.incoming.owes_grant(now):
            self._grant(session.peer, upload, now)
        return taken, taken and upload.incoming.done

    def settle(self, round: Round, members: AbstractSet[str], parts: tuple[str, ...]) -> None:
        """A round is closed: what counted late in it has counted, what else there is late of its block goes, and those
        on their way to the round itself are late from now on. members: who was to contribute to it. parts: all that was
        counted."""
        attempt, decay = round.attempt, self._config.round.late_decay
        for late in attempt.late if attempt is not None and parts else ():
            self._late.count(late, round.number)
            text = f"round {late.round}: counted in round {round.number}, its tokens by {decay:g}^{late.missed}"
            self._emit(Note("folded", late.client, text))
            self._tell(late.client, Late(late.round, round.number))
        owed = (members | round.uploads.keys()) - round.out - set(parts)
        for late in self._late.close(round.number, round.block, owed, empty=not parts):
            reason = f"round {round.number}, the next one of its block, was closed before all of it came"
            self._emit(Note("late", late.client, f"round {late.round}: not counted: {reason}"))
            self._tell(late.client, Rejected(late.round, reason))
        for name in sorted(round.uploads.keys() - set(parts)):
            missed = self._late.claim(name, round.block, round.number)
            assert missed == 1
            upload = round.uploads[name]
            refused = self._hold(name, upload, missed)
            if refused is None:
                self._tell(name, Late(round.number, -1))
            else:
                self._tell(name, Rejected(round.number, f"{refused}: {round.why}"))

    def _tell(self, client: str, message: FromBroker) -> None:
        for session in self._roster.active():
            if session.name == client:
                self._say(session.peer, message)

    def _grant(self, peer: bytes, upload: Upload, now: float) -> None:
        self._say(peer, Credit(upload.offer.round, upload.offer.block, 0, *upload.incoming.grant(now)))
