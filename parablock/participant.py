"""The participant: the worker's half of the protocol, as a state machine `(event, now) → effects`.

It knows what the broker has committed and what has arrived, sends contributions within their credit, and says which
round may be trained. It opens no socket, reads no clock and touches no model: `workers` performs its effects.

    CALLING ──Terms──▸ PREPARING ──Prepared──▸ JOINING ──Welcome──▸ WAITING ──Start──▸ TRAINING ──Finish──▸ LEAVING
       ▴                                                                                  │                    │
       └────────────────────────────── Rejoin (keeps what was prepared) ──────────────────┘                    ▾
    any state ──Refused, Stopped, out of patience──▸ GONE ◂──Goodbye───────────────────────────────────────────┘

What the broker may say in which state stands in `EXPECTED`; a message that does not fit is one that was delayed or
repeated, and is passed over. Contributions are kept until their round is closed, and partly received blocks until
they are superseded, so that a new greeting costs only what was not yet confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from parablock import wire
from parablock.commits import Commits
from parablock.messages import (
    PROTOCOL,
    Abstain,
    Chunk,
    Commit,
    Credit,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
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
from parablock.participant_events import (
    Arrived,
    Contribute,
    Dismissed,
    Effect,
    End,
    Event,
    Finish,
    Gone,
    Notice,
    Prepare,
    Prepared,
    Progress,
    Received,
    Say,
    Send,
    Started,
    Tick,
    Uploaded,
    Withhold,
)
from parablock.transfer import Incoming, Outgoing, TransferError
from parablock.wire import Buffer, Envelope

if TYPE_CHECKING:
    from parablock.config import Config


class State(Enum):
    CALLING = "calling"
    PREPARING = "preparing"
    JOINING = "joining"
    WAITING = "waiting"
    TRAINING = "training"
    LEAVING = "leaving"
    GONE = "gone"


EXPECTED: dict[type[Any], frozenset[State]] = {
    Terms: frozenset({State.CALLING}),
    Welcome: frozenset({State.JOINING}),
    Start: frozenset({State.JOINING, State.WAITING, State.TRAINING}),
    Commit: frozenset({State.JOINING, State.WAITING, State.TRAINING}),
    Chunk: frozenset({State.JOINING, State.WAITING, State.TRAINING}),
    Credit: frozenset({State.TRAINING}),
    Rejected: frozenset({State.TRAINING}),
    Heartbeat: frozenset(State) - {State.GONE},
    Rejoin: frozenset({State.PREPARING, State.JOINING, State.WAITING, State.TRAINING}),
    Goodbye: frozenset({State.LEAVING}),
    Refused: frozenset(State) - {State.GONE},
    Stopped: frozenset(State) - {State.GONE},
}


@dataclass
class _Upload:
    """A contribution, kept until its round is closed. outgoing: its transfer in the present session."""

    offer: Offer
    values: Buffer
    outgoing: Outgoing
    began: float
    progress_at: float
    uploaded: bool = False  # the broker has said that it holds all of it


@dataclass
class _Download:
    commit: Commit
    incoming: Incoming
    began: float


@dataclass
class _Timing:
    """Seconds. The first three hold before the broker has said its settings."""

    heartbeat: float = 2.0
    timeout: float = 30.0
    resend: float = 5.0
    call: float = 1.0
    leave: float = 10.0


class Participant:
    """See the module. patience_s: silence of the broker after which the worker gives up."""

    def __init__(self, name: str, session: str, patience_s: float, now: float) -> None:
        self.state = State.CALLING
        self._hello = Hello(name, session, PROTOCOL)
        self._patience_s = patience_s
        self._timing = _Timing()
        self._run = ""
        self._epoch = 0
        self._prepared: Prepared | None = None
        self._versions: list[int] = []
        self._commits = Commits(0)
        self._uploads: dict[int, _Upload] = {}
        self._unsettled: set[int] = set()  # rounds contributed to, of which we do not know whether we were counted
        self._withheld: dict[int, Abstain] = {}
        self._passed = 0  # rounds before it will not be trained by us any more
        self._start: Start | None = None
        self._downloads: dict[int, _Download] = {}
        self._partial: dict[tuple[int, int], Incoming] = {}  # by round and block: begun in an earlier session
        self._where = Progress(-1, 0)
        self._heard_at = now
        self._said_at = now - 1e9  # the first Tick calls
        self._silent = False
        self._leaving_since = now
        self._leave = Leave("")
        self._effects: list[Effect] = []

    # The outside

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time `now`; the effects are to be performed in order."""
        assert not self._effects
        try:
            if self.state is not State.GONE:
                self._take(event, now)
            return self._effects
        finally:
            self._effects = []

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Received(envelope):
                self._receive(envelope, now)
            case Prepared():
                self._prepared = event
                self._timing.heartbeat = event.config.network.heartbeat_s
                self._timing.timeout = event.config.network.timeout_s
                self._timing.resend = event.config.network.resend_s
                self._versions = self._versions or [0] * len(event.manifest.blocks)
                if self.state is State.PREPARING:
                    self._join(now)
            case Contribute():
                self._contribute(event, now)
            case Withhold(round, reason):
                self._withhold(round, reason)
            case Say(message):
                if self.state is State.TRAINING:
                    self._send(message)
            case Progress():
                self._where = event
            case Finish(reason):
                self._finish(reason, now)
            case Tick():
                self._tick(now)

    def deadline(self) -> float:
        """When the next `Tick` is due, on the scale of `now`."""
        if self.state in (State.CALLING, State.LEAVING):
            return self._said_at + self._timing.call
        times = [self._said_at + self._timing.heartbeat, self._heard_at + self._patience_s]
        times += [upload.progress_at + self._timing.resend for upload in self._sending()]
        return min(times)

    def may_train(self, round: int) -> bool:
        """Whether everything that `round` builds on is in hand: all but the last `in_flight` rounds before it."""
        return self.state is State.TRAINING and self.arrived_through(round - self._config.in_flight - 1)

    def arrived_through(self, round: int) -> bool:
        """Whether every block that was committed in or before `round` is in hand."""
        return self._commits.through(round)

    @property
    def told(self) -> int:
        """The first round that is not known to be committed; one before it need not be trained any more."""
        return self._commits.told

    # Messages

    def _receive(self, envelope: Envelope, now: float) -> None:
        message = envelope.message
        if self.state not in EXPECTED.get(type(message), frozenset()):
            return
        known = (envelope.run, envelope.epoch) == (self._run, self._epoch)
        if not known and not isinstance(message, Terms | Rejoin | Refused | Stopped):
            return
        self._heard_at = now
        if self._silent:
            self._silent = False
            self._notice("the broker is back")
        match message:
            case Terms():
                self._terms(envelope, message, now)
            case Rejoin(reason):
                self._rejoin(reason, now)
            case Welcome(clients):
                self.state = State.WAITING
                self._notice(f"on the roster ({clients} so far); waiting for the start")
            case Start():
                self._take_start(message, now)
            case Commit():
                self._commit(message, now)
            case Chunk():
                assert envelope.payload is not None
                self._chunk(message, envelope.payload, now)
            case Credit():
                self._credit(message, now)
            case Rejected(round, reason):
                self._dismiss(round, reason)
            case Refused(reason):
                self._gone(End.REFUSED, reason)
            case Stopped(reason):
                self._gone(End.LOST, f"the broker stopped: {reason}")
            case Goodbye():
                self._gone(End.DONE, "left the run")

    def _terms(self, envelope: Envelope, terms: Terms, now: float) -> None:
        if self._run and envelope.run != self._run:
            self._gone(End.LOST, f"the broker now serves another run ({envelope.run} instead of {self._run})")
            return
        self._run, self._epoch = envelope.run, envelope.epoch
        if self._prepared is None:
            self.state = State.PREPARING
            self._effects.append(Prepare(terms.config))
        else:
            self._join(now)

    def _rejoin(self, reason: str, now: float) -> None:
        """The broker forgot us, or thinks otherwise of us. What it has committed meanwhile will be sent."""
        self._notice(f"joining again: {reason}")
        for download in self._downloads.values():
            self._partial[download.commit.round, download.commit.block] = download.incoming
        self._downloads.clear()
        self._commits = Commits(self._commits.told)
        self.state = State.CALLING
        self._call(now)

    def _join(self, now: float) -> None:
        assert self._prepared is not None
        self.state = State.JOINING
        digest = self._prepared.manifest.digest
        self._send(
            Join(digest, self._prepared.base, self._prepared.tokenizer, self._prepared.rows, tuple(self._versions))
        )
        self._said_at = now

    def _take_start(self, start: Start, now: float) -> None:
        if self.state is State.TRAINING:
            assert self._start is not None
            if start != self._start and start.next >= self._start.next:
                self._rejoin("the broker has started this worker anew", now)
            return
        if start.next < self._commits.greeted_at:
            return  # of an earlier session: it would leave out what was committed since
        self.state = State.TRAINING
        self._start = start
        self._commits.start(start)
        self._partial = {key: incoming for key, incoming in self._partial.items() if self._commits.wanted(key[0])}
        self._effects.append(Started(start.round, start.clients, start.next))
        self._answer(start, now)
        self._heartbeat(now)  # at once: the broker places our reports in time by it

    def _answer(self, start: Start, now: float) -> None:
        """After a start: take up what the broker may not have, and find which rounds it need not wait for."""
        self._forget(start.next)
        self._unsettled = {round for round in self._unsettled if round >= start.next}
        for upload in self._uploads.values():
            network = self._config.network
            upload.outgoing = Outgoing(upload.values, network.chunk_bytes, network.window_bytes)
            upload.progress_at = now
            self._send(upload.offer)  # and no chunk yet: the answer says how much the broker holds
        for round in range(start.round, self._passed):
            if round not in self._uploads and round >= self._commits.told:
                self._withheld.setdefault(round, Abstain(round, "the worker had gone on to later rounds"))
        self._passed = max(self._passed, start.round)

    def _forget(self, next_round: int) -> None:
        """Let go of what was kept for rounds that are closed."""
        for number in [n for n in self._uploads if n < next_round]:
            del self._uploads[number]
        for number in [n for n in self._withheld if n < next_round]:
            del self._withheld[number]

    def _dismiss(self, round: int, reason: str) -> None:
        """The broker does not count our contribution to `round`, if there was one that we believed in."""
        self._uploads.pop(round, None)
        if round in self._unsettled:
            self._unsettled.remove(round)
            self._effects.append(Dismissed(round, reason))

    def _commit(self, commit: Commit, now: float) -> None:
        round = commit.round
        if not self._fits(commit):
            self._gone(End.REFUSED, f"the broker announced a block that is not in the manifest: {commit}")
            return
        self._commits.told = max(self._commits.told, round + 1)
        self._forget(round + 1)
        if commit.counted:
            self._unsettled.discard(round)
        self._dismiss(round, "the round was closed without it")
        if self._versions[commit.block] == round + 1 or not self._commits.wanted(round):
            self._commits.arrive(round)  # in hand since before this session, or not of this session
        if self._commits.has(round):  # repeated, because our last grant was lost
            self._send(Credit(round, commit.block, commit.nbytes, commit.nbytes))
            return
        if round not in self._downloads:
            network = self._config.network
            incoming = self._partial.pop((round, commit.block), None)
            if incoming is None:
                incoming = Incoming(commit.nbytes, network.chunk_bytes, network.window_bytes)
            self._downloads[round] = _Download(commit, incoming, now)
        self._receive_more(self._downloads[round], now)

    @property
    def _config(self) -> Config:
        assert self._prepared is not None
        return self._prepared.config

    def _fits(self, commit: Commit) -> bool:
        assert self._prepared is not None
        blocks = self._prepared.manifest.blocks
        if commit.block >= len(blocks):
            return False
        return commit.nbytes == (blocks[commit.block].nbytes if commit.contributors else 0)

    def _chunk(self, chunk: Chunk, payload: Buffer, now: float) -> None:
        download = self._downloads.get(chunk.round)
        if download is None or download.commit.block != chunk.block:
            return  # complete already, or its commit was lost: the sender hears of the one and repeats the other
        try:
            download.incoming.take(chunk.offset, payload)
        except TransferError as error:
            self._gone(End.REFUSED, f"the broker broke the protocol: {error}")
            return
        self._receive_more(download, now)

    def _receive_more(self, download: _Download, now: float) -> None:
        commit, incoming = download.commit, download.incoming
        self._send(Credit(commit.round, commit.block, incoming.held, incoming.until))
        if incoming.done:
            del self._downloads[commit.round]
            self._commits.arrive(commit.round)
            pieces = tuple(incoming.pieces) if commit.contributors else None
            if commit.contributors:
                self._versions[commit.block] = max(self._versions[commit.block], commit.round + 1)
            self._effects.append(
                Arrived(commit.round, commit.block, pieces, commit.contributors, commit.counted, download.began, now)
            )

    def _contribute(self, event: Contribute, now: float) -> None:
        self._passed = max(self._passed, event.round + 1)
        if event.round < self._commits.told:
            self._effects.append(Dismissed(event.round, "the round was closed before the contribution was ready"))
            return
        network = self._config.network
        outgoing = Outgoing(event.values, network.chunk_bytes, network.window_bytes)
        offer = Offer(event.round, event.block, outgoing.nbytes, event.weight, event.loss)
        upload = self._uploads[event.round] = _Upload(offer, event.values, outgoing, now, now)
        self._unsettled.add(event.round)
        if self.state is State.TRAINING:  # else after the next start
            self._offer(upload, now)

    def _withhold(self, round: int, reason: str) -> None:
        self._passed = max(self._passed, round + 1)
        if round >= self._commits.told:
            self._withheld[round] = Abstain(round, reason)
            if self.state is State.TRAINING:
                self._send(self._withheld[round])

    def _offer(self, upload: _Upload, now: float) -> None:
        upload.progress_at = now
        self._send(upload.offer)
        self._pump(upload)

    def _sending(self) -> list[_Upload]:
        """What is on its way up."""
        if self.state is not State.TRAINING:
            return []
        return [upload for upload in self._uploads.values() if not upload.outgoing.done]

    def _credit(self, credit: Credit, now: float) -> None:
        upload = self._uploads.get(credit.round)
        if upload is None or upload.offer.block != credit.block or upload.outgoing.done:
            return
        try:
            if upload.outgoing.credit(credit.held, credit.until):
                upload.progress_at = now
        except TransferError as error:
            self._gone(End.REFUSED, f"the broker broke the protocol: {error}")
            return
        if not upload.outgoing.done:
            self._pump(upload)
        elif not upload.uploaded:
            upload.uploaded = True
            self._effects.append(Uploaded(credit.round, upload.began, now))

    def _pump(self, upload: _Upload) -> None:
        for offset, view in upload.outgoing.due():
            header = wire.chunk(upload.offer.round, upload.offer.block, offset, view)
            self._effects.append(Send(Envelope(self._run, self._epoch, header, view)))

    # Time

    def _tick(self, now: float) -> None:
        quiet = now - self._heard_at
        if now >= self._heard_at + self._patience_s:
            self._gone(End.LOST, f"nothing heard from the broker for {self._patience_s:g} s")
            return
        if quiet >= self._timing.timeout and not self._silent and self.state is not State.CALLING:
            self._silent = True
            self._notice(f"nothing heard from the broker for {quiet:.0f} s; waiting for it")
        if self.state is State.CALLING and now >= self._said_at + self._timing.call:
            if not self._silent and quiet >= 2 * self._timing.call:
                self._silent = True
                self._notice("the broker does not answer yet; waiting for it")
            self._call(now)
        elif self.state is State.LEAVING and now >= self._said_at + self._timing.call:
            if now >= self._leaving_since + self._timing.leave:
                self._gone(End.DONE, "left the run (the broker did not answer)")
            else:
                self._send(self._leave)
                self._said_at = now
        elif self.state not in (State.CALLING, State.LEAVING) and now >= self._said_at + self._timing.heartbeat:
            self._heartbeat(now)
        for upload in self._sending():
            if now >= upload.progress_at + self._timing.resend:
                upload.outgoing.rewind()
                self._offer(upload, now)

    def _call(self, now: float) -> None:
        self._send(self._hello)
        self._said_at = now

    def _heartbeat(self, now: float) -> None:
        if self.state is State.JOINING:
            self._join(now)  # the Welcome was lost, or is on its way
        if self.state is State.TRAINING:
            for abstain in self._withheld.values():
                self._send(abstain)
        self._send(Heartbeat(now, self._where.round, self._where.step, self.state.value))
        self._said_at = now

    def _finish(self, reason: str, now: float) -> None:
        if self.state in (State.CALLING, State.PREPARING) and not self._run:
            self._gone(End.DONE, reason)
            return
        self.state = State.LEAVING
        self._leaving_since = now
        self._leave = Leave(reason)
        self._send(self._leave)
        self._said_at = now

    def _gone(self, end: End, reason: str) -> None:
        self.state = State.GONE
        self._effects.append(Gone(end, reason))

    def _notice(self, text: str) -> None:
        self._effects.append(Notice(text))

    def _send(self, message: FromWorker) -> None:
        self._effects.append(Send(Envelope(self._run, self._epoch, message)))
