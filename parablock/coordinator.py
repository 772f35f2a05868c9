"""The coordinator: the broker's half of the protocol, as a state machine `(event, now) → effects`.

It decides who takes part, when a round closes, and which bytes go where. It opens no socket, reads no clock, folds
no vectors and writes no file: it asks for that by effects, which `broker` performs. `now` is any monotonic time in
seconds; `deadline()` says when the next `Tick` is due.

    the run      GATHERING ──all clients joined──▸ RUNNING ──last commit──▸ DRAINING ──all have left──▸ OVER
    a session    GREETED ──Join──▸ JOINED ──Start──▸ ACTIVE         (gone: left, lost, refused, replaced ...)

A broker that was restarted begins with what its journal holds (`parablock.saved`): where a round was committed the run
is RUNNING at once, or DRAINING, and those who took part are expected back; whoever they sent contributions to is gone,
so they offer them again.

What a session may say in which state stands in `parablock.sessions.ALLOWED`; anything else breaks the protocol, and so
does who says more than its quota (`parablock.conduct`). That ends the session and closes its connection; it is counted,
and a client whose key proves its name is not let in for a while. One that has only greeted and
speaks as if it took part is one that was forgotten: it shall join again. A contribution that was acknowledged stays,
whatever becomes of the session that sent it.

On encrypted connections a session is its key: a client is called what the broker's list calls the key, and a message
that comes under a session's address by another key changes nothing, but is held against the key's owner.

Who is there is in `parablock.roster`, who is let in, and from which round on, in `parablock.admission`, what a round
trains and who does in `parablock.agenda`, what comes up and is counted in `parablock.collection`, what goes down in
`parablock.distribution`.
"""

from __future__ import annotations

import json
import math
from enum import Enum
from typing import TYPE_CHECKING

from parablock import config as settings
from parablock.admission import Admission
from parablock.agenda import Agenda
from parablock.collection import Collection
from parablock.conduct import Conduct
from parablock.coordinator_events import (
    LONGEST_QUOTE,
    NOBODY,
    Committed,
    Drop,
    Effect,
    Event,
    Folded,
    Malformed,
    Measured,
    Note,
    Over,
    Received,
    Reported,
    Revoked,
    Send,
    Stop,
    Stored,
    Tick,
    Unfit,
)
from parablock.distribution import Distribution
from parablock.messages import (
    MAX_PROBE_BYTES,
    PROTOCOL,
    Abstain,
    Chunk,
    Credit,
    Evaluated,
    FromBroker,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Keys,
    Landed,
    Leave,
    Offer,
    Probe,
    Probed,
    Refused,
    Rejoin,
    Shares,
    Start,
    Stopped,
    Terms,
    Unmasked,
    Waiting,
    Welcome,
)
from parablock.roster import Roster
from parablock.saved import EVERYBODY, Saved
from parablock.sessions import ALLOWED, Session, SessionState, takes_part
from parablock.transfer import TransferError
from parablock.wire import Envelope

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.wire import Buffer


class Phase(Enum):
    GATHERING = "gathering"
    RUNNING = "running"
    DRAINING = "draining"
    OVER = "over"


_PROBE_ANSWER = memoryview(bytes(MAX_PROBE_BYTES))
"""Every answer to a probe is a view of this: whoever asks for many and reads none makes us hold no payload."""

_LONGEST_REASON = 1000
"""Characters; see `parablock.messages.Reason`. A reason may quote what came."""

_UNKNOWN = "the broker does not know this session; say Hello again"


class Coordinator:
    """See the module. `base` and `tokenizer` are the digests that workers must show at the door.

    epoch: which incarnation of the run's broker this is, higher than any before. saved: what those have left, if there
    were any. Where they had committed a round, a Tick is due at once.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        base: str,
        tokenizer: str,
        run: str,
        epoch: int,
        saved: Saved | None = None,
    ) -> None:
        self.phase = Phase.GATHERING
        self._config = config
        self._terms = json.dumps(settings.to_dict(config, shared_only=True))
        self._manifest = manifest
        self._run = run
        self._epoch = epoch
        self._effects: list[Effect] = []
        self._due = math.inf  # no Tick is needed before
        self._looked_behind_at = 0  # the round at which `_leave_behind` was last called
        self._agenda = Agenda(config, len(manifest.blocks))
        self._roster = Roster()
        self._conduct = Conduct(config, manifest)
        self._distribution = Distribution(config, manifest, run, epoch, self._emit, self._due_by)
        self._admission = Admission(
            config, manifest, base, tokenizer, epoch, self._agenda, self._roster, self._distribution, self._due_by
        )
        sums = None
        if config.secure.enabled:
            from parablock.sums import Sums  # cryptography is an extra

            sums = Sums(config, manifest, self._agenda, self._roster, run, epoch, self._send, self._emit)
        self._collection = Collection(
            config, manifest, self._agenda, self._roster, self._distribution, self._send, self._emit, self._due_by, sums
        )
        if saved is not None and saved.next_round:
            self._restore(saved)
        elif epoch > 1:  # nothing tells who has given to the first rounds
            self._collection.restore(Saved(0, recent=(EVERYBODY,)))

    def _restore(self, saved: Saved) -> None:
        self._agenda.restore(saved.agenda)
        self._agenda.account(saved.next_round, saved.charged, saved.untold)
        self._collection.restore(saved)
        for version in saved.versions:
            self._distribution.restore(version)
        self._roster.expect(saved.clients, saved.next_round)
        self._agenda.decide(saved.next_round + self._config.in_flight, saved.clients)
        self._looked_behind_at = saved.next_round
        self.phase = Phase.DRAINING if self._collection.complete else Phase.RUNNING
        self._due = -math.inf

    # The outside

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time `now`; the effects are to be performed in order."""
        assert not self._effects
        try:
            if self.phase is not Phase.OVER:
                self._wait_for_expected(now)
                self._take(event, now)
                self._advance(now)
            return self._effects
        finally:
            self._effects = []

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Received() | Malformed():
                self._hear(event, now)
            case Revoked(client):
                self._revoked(client, now)
            case Measured(round, attempt, verdict):
                self._collection.measured(round, attempt, verdict)
            case Folded(round, attempt, chunk, moved):
                self._collection.folded(round, attempt, chunk, moved)
            case Unfit(round, attempt, reasons):
                self._collection.unfit(round, attempt, reasons, now)
            case Stored(round, attempt, values):
                self._collection.stored(round, attempt, values, now)
            case Tick():
                self._tick(now)
            case Stop(reason, returns):
                self._stop(reason, returns=returns)

    def deadline(self) -> float | None:
        """When the next `Tick` is due, on the scale of `now`; None: not before another event.

        Never late, and sometimes early: most events only put things off, and nobody looks through all sessions at
        each of them.
        """
        return None if self._due == math.inf else self._due

    @property
    def next_round(self) -> int:
        """The first round that is not committed."""
        return self._collection.next_round

    def members(self, round: int) -> frozenset[str]:
        """Live clients that take part in a round, and be it only to take over what the others make; and those that are
        expected back."""
        return self._roster.members(round)

    def present(self) -> frozenset[str]:
        """Live clients that take part in some round, this one or a later one; and those that are expected back."""
        return self._roster.present()

    def block(self, round: int) -> int | None:
        """Which block a round trains; None where that is not decided yet, or was long ago."""
        return self._agenda.find(round)

    @property
    def clients(self) -> list[str]:
        """Names on the roster, in its order; of those that are expected back as well."""
        return self._roster.clients

    # Messages

    def _hear(self, event: Received | Malformed, now: float) -> None:
        """Something has come over a connection."""
        peer, client = event.peer, event.client
        barred_s = self._conduct.barred_s(client, now)
        if barred_s:
            self._emit(Drop(peer, "not let in yet", client, barred_s))
        elif not self._is_its_own(peer, client):
            session = self._roster.get(peer)
            assert session is not None
            self._violation(peer, client, f"it spoke under the routing id of {session.name}", now)
        elif isinstance(event, Received):
            self._receive(peer, client, event.envelope, now)
        else:
            self._violation(peer, client, event.reason, now)

    def _is_its_own(self, peer: bytes, client: str | None) -> bool:
        """Whether no session of somebody else has this address."""
        session = self._roster.get(peer)
        return session is None or session.client == client

    def _receive(self, peer: bytes, client: str | None, envelope: Envelope, now: float) -> None:
        session = self._roster.get(peer)
        message = envelope.message
        if isinstance(message, Probe):  # from anybody, and without any effect on the run
            self._probe(peer, client, message, envelope.payload, now)
            return
        over = self._conduct.excess(peer, client, message, now)
        if over is not None:
            self._violation(peer, client, over, now)
            return
        if isinstance(message, Hello):
            self._hello(peer, client, message, now)
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
            reason = f"{type(message).__name__} from a session that is {session.state.value}"
            self._violation(peer, client, reason, now)
            return
        session.heard_at = now
        try:
            match message:
                case Credit():
                    self._distribution.credit(session, message, now)
                case Chunk():
                    assert envelope.payload is not None
                    if self._collection.chunk(session, message, envelope.payload, now):
                        self._conduct.took_chunk(session)
                case Heartbeat():
                    self._heartbeat(session, message, now)
                case Join():
                    self._join(session, message, now)
                case Offer():
                    self._collection.offer(session, message, now)
                case Abstain():
                    self._collection.abstain(session, message)
                case Keys() | Shares() | Unmasked():
                    self._collection.sum_up(session, message, envelope.payload, now)
                case Landed() | Evaluated():
                    self._emit(Reported(session.name, message))
                case Waiting(round):
                    self._collection.waits(session, round, now)
                case Leave():
                    self._send(peer, Goodbye("until the next time"))
                    self._remove(session, "left", message.reason[:LONGEST_QUOTE], now)
        except TransferError as error:
            self._violation(peer, client, str(error), now)

    def _probe(self, peer: bytes, client: str | None, probe: Probe, payload: Buffer | None, now: float) -> None:
        nbytes = probe.answer + (payload.nbytes if payload is not None else 0)
        over = self._conduct.excess_of_probes(peer, client, nbytes, now)
        if over is None:
            answer = _PROBE_ANSWER[: probe.answer] if probe.answer else None
            self._emit(Send(peer, Envelope(self._run, self._epoch, Probed(probe.sequence), answer)))
        elif (flood := self._conduct.excess(peer, client, probe, now)) is None:
            self._send(peer, Refused(over))
        else:
            self._violation(peer, client, flood, now)

    def _hello(self, peer: bytes, client: str | None, hello: Hello, now: float) -> None:
        if hello.protocol != PROTOCOL:
            self._send(peer, Refused(f"the broker speaks protocol {PROTOCOL}, the worker {hello.protocol}; "
                                     "install the same version of parablock on both sides"))  # fmt: skip
            return
        name = hello.name if client is None else client
        for other in self._roster.named(name):
            if other.token != hello.session:
                self._send(other.peer, Refused(f"another worker has joined under the name {name}"))
                self._remove(other, "replaced", "another worker has joined under this name", now)
            elif other.peer != peer or other.state is SessionState.ACTIVE:
                self._remove(other, "rejoining", "the worker greets again", now)
        session = self._roster.greet(peer, name, hello.session, now, client)
        self._due_by(now + self._config.network.timeout_s)
        if session.name != name:
            self._violation(peer, client, f"a Hello of {name} from the session of {session.name}", now)
            return
        session.heard_at = now
        self._send(peer, Terms(self._terms, name))

    def _join(self, session: Session, join: Join, now: float) -> None:
        if session.start is not None:  # repeated, because our answer was lost
            self._send(session.peer, session.start)
            return
        reason = self._admission.objection(join)
        if reason is not None:
            self._send(session.peer, Refused(reason))
            self._remove(session, "refused", reason, now)
            return
        if session.state is SessionState.GREETED:
            session.state = SessionState.JOINED
            rows = "it does not tell its rows" if self._config.privacy.local else f"{join.rows} training rows"
            self._come_or_go(session, "joined", rows, now)
        self._send(session.peer, Welcome(len(self._roster.clients)))
        if self.phase in (Phase.RUNNING, Phase.DRAINING):
            # Elsewhere what was given to a round that is being stored still counts, where late ones do.
            first_open = self._collection.next_open if self._config.privacy.local else self.next_round
            start = self._admission.admit(session, join, self.next_round, first_open, now)
            self._started(session, start, now)
            return
        self._admission.gathers(join, now)
        if self._admission.gathered(now):
            self._begin(now)

    def _begin(self, now: float) -> None:
        self.phase = Phase.RUNNING
        for session, start in self._admission.begin(self.next_round):
            self._started(session, start, now)

    def _started(self, session: Session, start: Start, now: float) -> None:
        self._collection.stir()
        self._send(session.peer, start)
        self._come_or_go(session, "started", f"from round {start.round}", now)

    def _heartbeat(self, session: Session, heartbeat: Heartbeat, now: float) -> None:
        self._emit(Reported(session.name, heartbeat))
        if session.start is not None:  # repeated, so that in the end both sides know of the same start
            self._send(session.peer, session.start)
        self._collection.remind(session)
        self._send(session.peer, Heartbeat(now, self.next_round, 0, self.phase.value))

    # Time

    def _advance(self, now: float) -> None:
        """Begin what can begin, close what can close, end what has ended."""
        if self.phase is Phase.GATHERING and self._admission.gathered(now):
            self._begin(now)
        if self.phase is Phase.RUNNING and self._collection.stirred:
            self._collection.advance(now)
            if self.next_round > self._looked_behind_at:
                self._looked_behind_at = self.next_round
                self._leave_behind(now)
            if self._collection.complete:
                self.phase = Phase.DRAINING
            elif self._collection.hopeless:
                self._stop(self._collection.hopeless, returns=False)
        if self.phase is Phase.DRAINING and not self._roster and not self._roster.expected:
            self._over(complete=True, reason="every round is committed and every client has left")

    def _tick(self, now: float) -> None:
        network = self._config.network
        times = []
        for session in list(self._roster):
            if now >= session.heard_at + network.timeout_s:
                self._remove(session, "lost", f"nothing heard for {network.timeout_s:g} s", now)
                continue
            self._distribution.resend(session, now)
            times.append(session.heard_at + network.timeout_s)
            times += [download.progress_at + network.resend_s for download in session.downloads.values()]
        self._collection.reclaim()
        times.append(self._admission.due(now))
        self._collection.stir()  # a deadline may have passed
        due = self._collection.deadline(now)
        self._due = min(times + ([] if due is None else [due]), default=math.inf)

    def _due_by(self, time: float) -> None:
        self._due = min(self._due, time)

    def _wait_for_expected(self, now: float) -> None:
        for name in self._admission.missed(now):
            self._collection.stir()
            timeout_s = self._config.network.timeout_s
            self._note("lost", name, f"not back within {timeout_s:g} s of the broker's restart")

    @property
    def expected(self) -> list[str]:
        """Names of those that took part before the broker's restart, and have not come yet."""
        return self._roster.expected

    # Sessions

    def _leave_behind(self, now: float) -> None:
        """A session that has newer versions of some blocks to come than the ones under way shall only get the newest.

        That is, when more blocks wait for it than there are.
        """
        for session in self._roster.active():
            if len(session.downloads) > len(self._manifest.blocks) + self._config.in_flight + 1:
                self._send(session.peer, Rejoin("your link fell too far behind; join again for the newest blocks"))
                self._remove(session, "behind", f"{len(session.downloads)} blocks wait for its link", now)

    def _revoked(self, client: str, now: float) -> None:
        """End what this client has here: nobody waits for it, and what it has not sent to its end does not count."""
        self._conduct.forget(client)
        reason = "the broker's owner has revoked the key of this worker"
        for session in [session for session in self._roster if session.client == client]:
            self._send(session.peer, Refused(reason))
            self._remove(session, "revoked", "its key was revoked", now, told=True)
        self._collection.withdraw(client)  # of one that was lost, too, and might have come back
        self._collection.stir()
        if client in self._roster.expected:
            self._roster.unexpect(client)
            self._note("revoked", client, "its key was revoked before it was back")
        self._emit(Drop(NOBODY, reason, client))

    def _violation(self, peer: bytes, client: str | None, reason: str, now: float) -> None:
        """The peer has broken the protocol, or the client whose key its connection has.

        Where it has taken over another's address nobody is answered there: that would be whoever has it by then.
        """
        stolen = not self._is_its_own(peer, client)
        session = None if stolen else self._roster.get(peer)
        offender = client if client is not None else session.name if session is not None else ""
        offence, text = self._conduct.offend(offender, reason, now, proven=client is not None)
        ended = [each for each in self._roster if (each is session if client is None else each.client == client)]
        for address in {each.peer for each in ended} | (set() if stolen else {peer}):
            self._send(address, Refused(f"the worker {text}"[:_LONGEST_REASON]))
        for each in ended:
            self._remove(each, "dropped", text, now, told=offence.told)
        if not ended and offence.told:
            self._note("dropped", offender, text if offender else f"a stranger {text}")
        self._emit(Drop(peer, reason, client, offence.barred_s))

    def _remove(self, session: Session, kind: str, text: str, now: float, *, told: bool | None = None) -> None:
        """told: see `Note`; None: as one of the client's comings and goings."""
        self._collection.part_from(session.name)
        self._roster.remove(session)
        if kind in ("left", "refused", "dropped", "revoked"):
            self._roster.unexpect(session.name)
        self._collection.stir()
        if told is None:
            self._come_or_go(session, kind, text, now)
        else:
            self._note(kind, session.name, text, told=told)
        if kind not in ("lost", "behind", "rejoining"):  # else the same process may come back, and go on with them
            self._collection.withdraw(session.name)

    def _stop(self, reason: str, *, returns: bool) -> None:
        for session in self._roster:
            self._send(session.peer, Stopped(reason, returns))
        self._over(complete=False, reason=reason)

    def _over(self, *, complete: bool, reason: str) -> None:
        self.phase = Phase.OVER
        self._emit(Over(complete, reason))

    def _send(self, peer: bytes, message: FromBroker, payload: Buffer | None = None) -> None:
        self._effects.append(Send(peer, Envelope(self._run, self._epoch, message, payload)))

    def _come_or_go(self, session: Session, kind: str, text: str, now: float) -> None:
        told, text = self._conduct.tell(session, text, now)
        self._note(kind, session.name, text, told=told)

    def _note(self, kind: str, client: str, text: str, *, told: bool = True) -> None:
        self._emit(Note(kind, client, text, told))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)
        if isinstance(effect, Send):
            if isinstance(effect.envelope.message, Chunk):
                session = self._roster.get(effect.peer)
                assert session is not None
                self._conduct.sent_chunk(session)
        elif isinstance(effect, Committed):
            for session in self._roster.active():
                self._conduct.sent_commit(session)
