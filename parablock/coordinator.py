"""The coordinator: the broker's half of the protocol, as a state machine `(event, now) → effects`.

It decides who takes part, when a round closes, and which bytes go where. It opens no socket, reads no clock, folds
no vectors and writes no file: it asks for that by effects, which `broker` performs. `now` is any monotonic time in
seconds; `deadline()` says when the next `Tick` is due.

    the run      GATHERING ──all clients joined──▸ RUNNING ──last commit──▸ DRAINING ──all have left──▸ OVER
    a session    GREETED ──Join──▸ JOINED ──Start──▸ ACTIVE         (gone: left, lost, refused, replaced ...)

What a session may say in which state stands in `parablock.sessions.ALLOWED`; anything else breaks the protocol and ends
the session. One that has only greeted and speaks as if it took part is one that was forgotten: it shall join again.
Rounds are committed in order, each at most once. A contribution that was acknowledged stays, whatever becomes of the
session that sent it.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING

from parablock import config as settings
from parablock import wire
from parablock.coordinator_events import (
    Committed,
    Effect,
    Event,
    Fold,
    Folded,
    Malformed,
    Note,
    Over,
    Received,
    Reported,
    Send,
    Stop,
    Tick,
    Unfit,
)
from parablock.messages import (
    PROTOCOL,
    Abstain,
    Chunk,
    Commit,
    Credit,
    Evaluated,
    FromBroker,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Landed,
    Leave,
    Offer,
    Refused,
    Rejected,
    Rejoin,
    Start,
    Stopped,
    Terms,
    Welcome,
)
from parablock.rounds import Round, RoundState, Upload, decide
from parablock.schedule import Schedule
from parablock.sessions import ALLOWED, Download, Session, SessionState, Version, takes_part
from parablock.transfer import Incoming, Outgoing, TransferError
from parablock.wire import Buffer, Envelope

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.manifest import Manifest


class Phase(Enum):
    GATHERING = "gathering"
    RUNNING = "running"
    DRAINING = "draining"
    OVER = "over"


_UNKNOWN = "the broker does not know this session; say Hello again"


class Coordinator:
    """See the module. `base` and `tokenizer` are the digests that workers must show at the door."""

    def __init__(self, config: Config, manifest: Manifest, base: str, tokenizer: str, run: str, epoch: int) -> None:
        self.phase = Phase.GATHERING
        self.next_round = 0  # the first that is not committed
        self._config = config
        self._terms = json.dumps(settings.to_dict(config, shared_only=True))
        self._manifest = manifest
        self._base = base
        self._tokenizer = tokenizer
        self._run = run
        self._epoch = epoch
        self._schedule = Schedule.of(config, len(manifest.blocks))
        self._sessions: dict[bytes, Session] = {}
        self._rounds: dict[int, Round] = {}
        self._latest: dict[int, Version] = {}  # by block; none: as in the base model
        self._now = 0.0  # of the last event
        self._effects: list[Effect] = []

    # The outside

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time `now`; the effects are to be performed in order."""
        assert not self._effects
        self._now = now
        try:
            if self.phase is not Phase.OVER:
                self._take(event, now)
                self._advance(now)
            return self._effects
        finally:
            self._effects = []

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Received(peer, envelope):
                self._receive(peer, envelope, now)
            case Malformed(peer, reason):
                self._violation(self._sessions.get(peer), peer, reason)
            case Folded(round, values):
                self._commit(self._rounds[round], values, now)
            case Unfit(round, reasons):
                self._unfit(self._rounds[round], reasons)
            case Tick():
                self._tick(now)
            case Stop(reason):
                for session in self._sessions.values():
                    self._send(session.peer, Stopped(reason))
                self._over(complete=False, reason=reason)

    def deadline(self) -> float | None:
        """When the next `Tick` is due, on the scale of `now`; None: not before another event."""
        network = self._config.network
        times = [session.heard_at + network.timeout_s for session in self._sessions.values()]
        times += [
            download.progress_at + network.resend_s
            for session in self._sessions.values()
            for download in session.downloads.values()
        ]
        round = self._rounds.get(self.next_round)
        if self._config.round.deadline_s and round is not None and round.first_done_at is not None:
            due = round.first_done_at + self._config.round.deadline_s
            if due > self._now:  # one that has passed was looked at, and passes only once
                times.append(due)
        return min(times, default=None)

    def members(self, round: int) -> set[str]:
        """Live clients that take part in a round."""
        return {
            session.name
            for session in self._sessions.values()
            if session.start is not None and session.start.round <= round
        }

    def present(self) -> set[str]:
        """Live clients that take part in some round, this one or a later one."""
        return {session.name for session in self._sessions.values() if session.start is not None}

    @property
    def clients(self) -> list[str]:
        """Names on the roster, in its order."""
        return sorted(s.name for s in self._sessions.values() if s.state is not SessionState.GREETED)

    # Messages

    def _receive(self, peer: bytes, envelope: Envelope, now: float) -> None:
        session = self._sessions.get(peer)
        message = envelope.message
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return
        if session is None or (envelope.run, envelope.epoch) != (self._run, self._epoch):
            if isinstance(message, Leave):
                self._send(peer, Goodbye("you were not on the roster"))
            else:
                self._send(peer, Rejoin(_UNKNOWN))
            return
        allowed = ALLOWED.get(type(message))
        if allowed is not None and session.state is SessionState.GREETED and takes_part(message):
            self._send(peer, Rejoin(_UNKNOWN))
            return
        if allowed is None or session.state not in allowed:
            self._violation(session, peer, f"{type(message).__name__} from a session that is {session.state.value}")
            return
        session.heard_at = now
        try:
            match message:
                case Join():
                    self._join(session, message, now)
                case Heartbeat():
                    self._heartbeat(session, message, now)
                case Offer():
                    self._offer(session, message)
                case Chunk():
                    assert envelope.payload is not None
                    self._chunk(session, message, envelope.payload, now)
                case Credit():
                    self._credit(session, message, now)
                case Abstain():
                    self._abstain(session, message)
                case Landed() | Evaluated():
                    self._effects.append(Reported(session.name, message))
                case Leave():
                    self._send(peer, Goodbye("until the next time"))
                    self._remove(session, "left", message.reason)
        except TransferError as error:
            self._violation(session, peer, str(error))

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        if hello.protocol != PROTOCOL:
            self._send(peer, Refused(f"the broker speaks protocol {PROTOCOL}, the worker {hello.protocol}; "
                                     "install the same version of parablock on both sides"))  # fmt: skip
            return
        for other in [s for s in self._sessions.values() if s.name == hello.name]:
            if other.token != hello.session:
                self._send(other.peer, Refused(f"another worker has joined under the name {hello.name}"))
                self._remove(other, "replaced", "another worker has joined under this name")
            elif other.peer != peer or other.state is SessionState.ACTIVE:
                self._remove(other, "rejoining", "the worker greets again")
        session = self._sessions.setdefault(peer, Session(peer, hello.name, hello.session, now))
        if session.name != hello.name:
            self._violation(session, peer, f"a Hello of {hello.name} from the session of {session.name}")
            return
        session.heard_at = now
        self._send(peer, Terms(self._terms))

    def _join(self, session: Session, join: Join, now: float) -> None:
        if session.start is not None:  # repeated, because our answer was lost
            self._send(session.peer, session.start)
            return
        reason = self._mismatch(join)
        if reason is not None:
            self._send(session.peer, Refused(reason))
            self._remove(session, "refused", reason)
            return
        if session.state is SessionState.GREETED:
            session.state = SessionState.JOINED
            self._note("joined", session.name, f"{join.rows} training rows")
        self._send(session.peer, Welcome(len(self.clients)))
        if self.phase in (Phase.RUNNING, Phase.DRAINING):
            self._admit(session, join, now)
        elif len(self.clients) >= self._config.round.clients:
            self.phase = Phase.RUNNING
            for other in self._sessions.values():
                if other.state is SessionState.JOINED:
                    self._start(other, Start(0, len(self.clients), 0, ()))

    def _mismatch(self, join: Join) -> str | None:
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

    def _admit(self, session: Session, join: Join, now: float) -> None:
        """Let a worker in after the start: what changed since its versions first, then a round that it can reach.

        Clients may be as far as in_flight rounds beyond the next commit; a newcomer begins right after those, so
        that nobody waits for it, unless the round at hand lacks the quorum.
        """
        pending = []
        for block, version in sorted(self._latest.items(), key=lambda item: item[1].round):
            if join.versions[block] != version.round + 1:
                pending.append(version.round)
                # And no chunk yet: the answer says how much the worker holds from an earlier session.
                self._announce(session, version.round, block, version.values, version.counted, now)
        short = len(self.members(self.next_round)) < self._config.quorum
        first = self.next_round if short else self.next_round + self._config.in_flight + 1
        first = min(first, self._config.rounds)
        self._start(session, Start(first, len(self.clients), self.next_round, tuple(pending)))

    def _start(self, session: Session, start: Start) -> None:
        session.state = SessionState.ACTIVE
        session.start = start
        self._send(session.peer, start)
        self._note("started", session.name, f"from round {start.round}")

    def _heartbeat(self, session: Session, heartbeat: Heartbeat, now: float) -> None:
        self._effects.append(Reported(session.name, heartbeat))
        if session.start is not None:  # repeated, so that in the end both sides know of the same start
            self._send(session.peer, session.start)
        self._send(session.peer, Heartbeat(now, self.next_round, 0, self.phase.value))

    def _offer(self, session: Session, offer: Offer) -> None:
        assert session.start is not None
        if offer.round < self.next_round:
            if offer.round not in session.downloads:  # else the commit is on its way, and says what became of it
                self._send(session.peer, Rejected(offer.round, "the round was closed before the contribution came"))
            return
        if offer.round > self.next_round + self._config.in_flight or offer.round >= self._config.rounds:
            raise TransferError(f"a contribution to round {offer.round} while round {self.next_round} is open")
        round = self._round(offer.round)
        expected = self._manifest.blocks[round.block].nbytes
        if (offer.block, offer.nbytes) != (round.block, expected):
            raise TransferError(
                f"round {offer.round} trains block {round.block} of {expected} bytes; "
                f"got block {offer.block} of {offer.nbytes} bytes"
            )
        upload = round.uploads.get(session.name)
        resumed = upload is not None and upload.session == session.token
        reason = None
        if session.name in round.out:
            reason = "the client has abstained, or its contribution was refused before"
        elif not resumed and upload is not None and upload.incoming.done:
            reason = "a contribution that an earlier process of this name sent is counted"
        elif not resumed and offer.round < session.start.round:
            reason = f"the client takes part from round {session.start.round} on"
        if reason is not None:
            self._send(session.peer, Rejected(offer.round, reason))
            return
        if round.state is not RoundState.OPEN:
            return  # the commit will say that it is closed; if it is opened again, the offer will be repeated
        if upload is None or not resumed:
            network = self._config.network
            incoming = Incoming(offer.nbytes, network.chunk_bytes, network.window_bytes)
            upload = round.uploads[session.name] = Upload(session.token, offer, incoming)
        elif upload.offer != offer:
            raise TransferError(f"a second, different contribution to round {offer.round}")
        self._send(session.peer, _grant(offer.round, offer.block, upload.incoming))

    def _chunk(self, session: Session, chunk: Chunk, payload: Buffer, now: float) -> None:
        round = self._rounds.get(chunk.round)
        upload = round.uploads.get(session.name) if round is not None else None
        if round is None or upload is None or upload.session != session.token or chunk.block != round.block:
            return  # of a closed round, or its offer was lost: the sender hears of the one and repeats the other
        if round.state is not RoundState.OPEN:
            return  # what is being folded does not change
        upload.incoming.take(chunk.offset, payload)
        self._send(session.peer, _grant(chunk.round, chunk.block, upload.incoming))
        if upload.incoming.done and round.first_done_at is None:
            round.first_done_at = now

    def _credit(self, session: Session, credit: Credit, now: float) -> None:
        download = session.downloads.get(credit.round)
        if download is None or download.commit.block != credit.block:
            return  # a repeated grant of a transfer that is complete
        if download.outgoing.credit(credit.held, credit.until):
            download.progress_at = now
        if download.outgoing.done:
            del session.downloads[credit.round]
        else:
            self._pump(session, download)

    def _abstain(self, session: Session, abstain: Abstain) -> None:
        if not self.next_round <= abstain.round <= self.next_round + self._config.in_flight:
            return  # repeated after the round was closed
        round = self._round(abstain.round)
        if round.state is RoundState.OPEN and session.name not in round.out | round.done:
            round.uploads.pop(session.name, None)
            round.out.add(session.name)
            self._note("abstained", session.name, f"round {abstain.round}: {abstain.reason}")

    # Rounds

    def _round(self, number: int) -> Round:
        if number not in self._rounds:
            self._rounds[number] = Round(number, self._schedule.block(number))
        return self._rounds[number]

    def _advance(self, now: float) -> None:
        """Close what can close, end what has ended."""
        if self.phase is Phase.RUNNING:
            round = self._round(self.next_round)
            if round.state is RoundState.OPEN:
                members, policy = self.members(round.number), self._config.round
                decision = decide(round, members, self.present(), self._config.quorum, policy.deadline_s, now)
                if decision.close:
                    round.move("close")
                    round.why = decision.reason
                    contributions = round.contributions()
                    if contributions:
                        self._effects.append(Fold(round.number, round.block, contributions))
                    else:
                        self._commit(round, None, now)
                        self._advance(now)
        elif self.phase is Phase.DRAINING and not self._sessions:
            self._over(complete=True, reason="every round is committed and every client has left")

    def _commit(self, round: Round, values: Buffer | None, now: float) -> None:
        round.move("commit")
        counted = tuple(sorted(round.done)) if values is not None else ()
        late = sorted(set(round.uploads) - set(counted))
        if values is not None:
            self._latest[round.block] = Version(round.number, values, counted)
        self.next_round = round.number + 1
        payload = values if values is not None else memoryview(b"")
        active = [session for session in self._sessions.values() if session.state is SessionState.ACTIVE]
        rejected = Rejected(round.number, f"the round was closed before all of it came: {round.why}")
        for session in active:
            if session.name in late:
                self._send(session.peer, rejected)
            if len(session.downloads) > len(self._manifest.blocks) + self._config.in_flight:
                # It has newer versions of some blocks to come than the ones under way: only the newest are worth it.
                self._send(session.peer, Rejoin("your link fell too far behind; join again for the newest blocks"))
                self._remove(session, "behind", f"{len(session.downloads)} blocks wait for its link")
                continue
            self._pump(session, self._announce(session, round.number, round.block, payload, counted, now))
        weights = {name: round.uploads[name].offer.weight for name in counted}
        loss = None
        if counted:
            loss = sum(round.uploads[name].offer.loss * weights[name] for name in counted) / sum(weights.values())
        bytes_up = sum(upload.incoming.held for upload in round.uploads.values())
        bytes_down = payload.nbytes * len(active)
        reason = f"{len(counted)} contributions; {round.why}"
        self._effects.append(
            Committed(round.number, round.block, counted, len(late), loss, bytes_up, bytes_down, reason)
        )
        del self._rounds[round.number]
        if self.next_round == self._config.rounds:
            self.phase = Phase.DRAINING

    def _unfit(self, round: Round, reasons: dict[str, str]) -> None:
        round.move("reopen")
        for name, reason in reasons.items():
            del round.uploads[name]
            round.out.add(name)
            self._note("rejected", name, f"round {round.number}: {reason}")
            for session in self._sessions.values():
                if session.name == name:
                    self._send(session.peer, Rejected(round.number, reason))
        if not round.done:
            round.first_done_at = None
        for session in self._sessions.values():  # what came while the round was folded was not taken
            upload = round.uploads.get(session.name)
            if upload is not None and not upload.incoming.done:
                self._send(session.peer, _grant(round.number, round.block, upload.incoming))

    # Sessions

    def _announce(
        self, session: Session, round: int, block: int, values: Buffer, counted: tuple[str, ...], now: float
    ) -> Download:
        """Tell a session of a commit, of which the block is to follow (no bytes where nobody was counted)."""
        network = self._config.network
        commit = Commit(round, block, values.nbytes, len(counted), session.name in counted)
        download = Download(commit, Outgoing(values, network.chunk_bytes, network.window_bytes), now)
        session.downloads[round] = download
        self._send(session.peer, commit)
        return download

    def _pump(self, session: Session, download: Download) -> None:
        for offset, view in download.outgoing.due():
            header = wire.chunk(download.commit.round, download.commit.block, offset, view)
            self._effects.append(Send(session.peer, Envelope(self._run, self._epoch, header, view)))

    def _tick(self, now: float) -> None:
        network = self._config.network
        for session in list(self._sessions.values()):
            if now >= session.heard_at + network.timeout_s:
                self._remove(session, "lost", f"nothing heard for {network.timeout_s:g} s")
                continue
            for download in session.downloads.values():
                if now >= download.progress_at + network.resend_s:
                    download.progress_at = now
                    download.outgoing.rewind()
                    self._send(session.peer, download.commit)
                    self._pump(session, download)

    def _violation(self, session: Session | None, peer: bytes, reason: str) -> None:
        self._send(peer, Refused(f"the worker broke the protocol: {reason}"))
        if session is not None:
            self._remove(session, "dropped", f"broke the protocol: {reason}")
        else:
            self._note("dropped", "", f"a stranger broke the protocol: {reason}")

    def _remove(self, session: Session, kind: str, text: str) -> None:
        del self._sessions[session.peer]
        self._note(kind, session.name, text)
        if kind in ("lost", "behind", "rejoining"):
            return  # the same process may come back, and go on with its uploads where they are
        for round in self._rounds.values():
            upload = round.uploads.get(session.name)
            if upload is not None and not upload.incoming.done:
                del round.uploads[session.name]

    def _over(self, *, complete: bool, reason: str) -> None:
        self.phase = Phase.OVER
        self._effects.append(Over(complete, reason))

    def _send(self, peer: bytes, message: FromBroker) -> None:
        self._effects.append(Send(peer, Envelope(self._run, self._epoch, message)))

    def _note(self, kind: str, client: str, text: str) -> None:
        self._effects.append(Note(kind, client, text))


def _grant(round: int, block: int, incoming: Incoming) -> Credit:
    return Credit(round, block, incoming.held, incoming.until)
