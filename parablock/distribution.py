"""The distribution of new blocks: which versions there are, and what is on its way to which session.

A block leaves chunk by chunk while it is being folded; only a commit makes it count. Chunks and the messages around
them are made once and shared by all who get them; each session is sent them within its own credit, so that a slow one
delays nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.coordinator_events import Send
from parablock.layout import Layout
from parablock.messages import Commit
from parablock.sessions import Download, Shipment, Version
from parablock.transfer import Outgoing, Payload
from parablock.wire import Envelope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parablock.agenda import Turn
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import Credit
    from parablock.saved import SavedVersion
    from parablock.sessions import Session
    from parablock.wire import Buffer


class Distribution:
    """emit: asks for an effect. due_by: a Tick is needed by then, in seconds."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        run: str,
        epoch: int,
        emit: Callable[[Send], None],
        due_by: Callable[[float], None],
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._run = run
        self._epoch = epoch
        self._emit = emit
        self._due_by = due_by
        self._latest: dict[int, Version] = {}  # by block; none: as in the base model

    def shipment(self, round: int, block: int, attempt: int) -> Shipment:
        """A block that is about to be folded, of which nothing is there yet."""
        layout = Layout.down(self._config, self._manifest.blocks[block].numel, attempt)
        return self._shipment(round, block, attempt, Payload.of(layout))

    def nothing(self, round: int, block: int) -> Shipment:
        """What a round sends that changes nothing."""
        return self._shipment(round, block, 0, Payload(0, 1))

    def ship(self, session: Session, shipment: Shipment, now: float) -> None:
        """A session shall get this as it is made, in place of what it was getting of the round."""
        self._ship(session, shipment, self._config.network.window_bytes, now)

    def _ship(self, session: Session, shipment: Shipment, credit: int, now: float) -> Download:
        """credit: bytes that may leave before the session has granted any."""
        outgoing = Outgoing(shipment.payload, credit)
        download = session.downloads[shipment.round] = Download(shipment, outgoing, now)
        self._due_by(now + self._config.network.resend_s)
        return download

    def more(self, session: Session, shipment: Shipment) -> None:
        """More of the shipment is ready: send what the session's credit covers, if it is getting this."""
        download = session.downloads.get(shipment.round)
        if download is not None and download.shipment is shipment:
            self._pump(session)

    def base(self, block: int) -> int:
        """The round that made the newest version, −1 where none did."""
        return self._latest[block].round if block in self._latest else -1

    def keep(self, made: Shipment, counted: tuple[str, ...], values: Buffer) -> None:
        """A new version takes the old one's place; changes that nobody can be in the middle of go.

        values: the whole block in float32.
        """
        full, change = made, None
        numel = self._manifest.blocks[made.block].numel
        if not Layout.down(self._config, numel, made.attempt).codec.lossless:
            full, change = self._full(made.round, made.block, values), made
        self._latest[made.block] = Version(made.round, self.base(made.block), counted, change, full)
        for version in self._latest.values():
            if version.round < made.round - self._config.in_flight - 1:
                version.change = None

    def restore(self, version: SavedVersion) -> None:
        """A version that was made before the broker's restart. It is sent in full: of its attempts nothing is left."""
        full = self._full(version.round, version.block, version.values)
        self._latest[version.block] = Version(version.round, version.base, version.counted, None, full)

    def announce(
        self,
        session: Session,
        shipment: Shipment,
        base: int,
        counted: tuple[str, ...],
        now: float,
        turns: Sequence[Turn] = (),
        ahead_s: float = 0.0,
    ) -> None:
        """Tell a session of a commit, whose block it is getting or shall get (no bytes where nobody was counted).

        Where it gets nothing of it yet no chunk leaves now: the answer says what it holds from an earlier session.
        turns: what is to be said with it of rounds ahead. ahead_s: as in `Commit`.
        """
        download = session.downloads.get(shipment.round)
        if download is None or download.shipment is not shipment:
            download = self._ship(session, shipment, 0, now)
        nbytes = shipment.payload.nbytes
        download.commit = Commit(
            shipment.round,
            shipment.block,
            shipment.attempt,
            base,
            nbytes,
            len(counted),
            session.name in counted,
            tuple(turn.block for turn in turns),
            tuple(turn.trains for turn in turns),
            ahead_s,
        )
        download.progress_at = now
        self._say(session, download.commit)

    def catch_up(self, session: Session, versions: Sequence[int], now: float) -> tuple[int, ...]:
        """Announce what has changed since `versions` (by block: the round that made it plus one); those rounds."""
        pending = []
        for block, version in sorted(self._latest.items(), key=lambda item: item[1].round):
            if versions[block] != version.round + 1:
                pending.append(version.round)
                change = version.change if versions[block] == version.base + 1 else None
                self.announce(session, change or version.full, version.base, version.counted, now)
        return tuple(pending)

    def credit(self, session: Session, credit: Credit, now: float) -> None:
        """Raises TransferError for an impossible one."""
        download = session.downloads.get(credit.round)
        if download is None or (download.shipment.block, download.shipment.attempt) != (credit.block, credit.attempt):
            return  # a repeated grant of a transfer that is complete, or one of an attempt that was given up
        if download.outgoing.credit(credit.held, credit.until):
            download.progress_at = now
        if download.outgoing.done:
            del session.downloads[credit.round]
        self._pump(session)

    def resend(self, session: Session, now: float) -> None:
        """Send again what was not confirmed for too long."""
        for download in session.downloads.values():
            if now >= download.progress_at + self._config.network.resend_s:
                download.progress_at = now
                if download.commit is not None:
                    self._say(session, download.commit)
                elif download.outgoing.sent == download.outgoing.nbytes:
                    continue  # the last byte is confirmed with the commit only, which is still to come
                download.outgoing.rewind()
        self._pump(session)

    def _full(self, round: int, block: int, values: Buffer) -> Shipment:
        layout = Layout.down(self._config, self._manifest.blocks[block].numel, attempt=0)
        return self._shipment(round, block, 0, Payload.whole(values, layout.chunk_bytes))

    def _shipment(self, round: int, block: int, attempt: int, payload: Payload) -> Shipment:
        return Shipment(self._run, self._epoch, round, block, attempt, payload)

    def _pump(self, session: Session) -> None:
        """Send what is ready, earlier blocks first. No more than a window is under way to one session altogether:
        what is queued for a slow one delays all that is said to it.

        But for a chunk of the earliest: what is under way may be changes of it, whose end is not confirmed before.
        """
        room = self._config.network.window_bytes
        room -= sum([download.outgoing.under_way for download in session.downloads.values()])
        for place, download in enumerate(session.downloads.values()):
            alone = place == 0 and not download.outgoing.under_way
            least = download.shipment.payload.chunk_bytes if alone else 0
            for offset, chunk in download.outgoing.due(max(room, least)):
                room -= chunk.payload.nbytes
                self._emit(Send(session.peer, download.shipment.envelope(offset, chunk)))

    def _say(self, session: Session, commit: Commit) -> None:
        self._emit(Send(session.peer, Envelope(self._run, self._epoch, commit)))
