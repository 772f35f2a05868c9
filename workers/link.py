"""The worker's end of the link: performs the participant's effects on a DEALER socket, and lets the round loop wait.

    frames ──decode──▸ participant ──effects──▸ socket, arrivals, notices
                          ▴   ▴
                          │   └── Contribute, Say, Finish: from the round loop; Ready: from the outbox
                          └── Tick, at the participant's own deadline

Lives on the event loop alone. Chunks go through the inbox and the outbox, whose threads decode and encode them. What
has arrived is taken by the round loop (`arrivals`), at its own time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from parablock import wire
from parablock.participant import Participant
from parablock.participant_events import (
    Arrived,
    Contribute,
    Deferred,
    Denied,
    Dismissed,
    Dropped,
    End,
    Event,
    Fetch,
    Fetched,
    Finish,
    Gone,
    Mask,
    Notice,
    OnDisk,
    Prepare,
    Prepared,
    Progress,
    Ready,
    Received,
    Send,
    Settled,
    Started,
    Tick,
    Took,
    Uploaded,
    Withdraw,
)
from workers.handshakes import Handshake, Refusals, denied, failed
from workers.inbox import Delivery, Inbox
from workers.masking_outbox import MaskingOutbox
from workers.outbox import Outbox
from workers.socket import DealerSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    import zmq

    from parablock.tensor_file import Reader
    from parablock.transfer import Encoded
    from parablock.wire import Buffer
    from workers.inbox import Staging, Vector
    from workers.outbox import Encoding, Leaving
    from workers.socket import Credentials
    from workers.spill import Spillable

log = logging.getLogger("worker")

_TELLING_FAILURES = 3
"""So many handshakes in a row that fail are no accident of the link, and the user hears of them."""


class Interrupted(Exception):
    """The user wants this worker to leave."""


class SessionEnded(Exception):
    """The session is over; `gone` says how and why."""

    def __init__(self, gone: Gone) -> None:
        super().__init__(gone.reason)
        self.gone = gone


class Link:
    """One session with one broker. on_gone: called once, when the session has ended.

    context, credentials: see `DealerSocket`. run: see `Participant`. refused_s: see `Refusals`.
    """

    def __init__(
        self,
        endpoint: str,
        name: str,
        session: str,
        patience_s: float,
        on_gone: Callable[[], None],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        credentials: Credentials | None = None,
        run: str = "",
        refused_s: float = 1.0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_gone = on_gone
        self._endpoint = endpoint
        self._credentials = credentials
        self._failed_handshakes = 0  # since the last one that was done
        self._refusals = Refusals(refused_s)
        self._again: asyncio.TimerHandle | None = None  # when a socket is made anew
        self.participant = Participant(name, session, patience_s, time.monotonic(), run)
        self.terms: str | None = None
        self.name = name  # from the terms on, what the broker calls us
        self.started: Started | None = None  # the newest start; taken by the round loop
        self.arrivals: deque[Delivery] = deque()  # appended here, taken by the round loop or the torch thread
        self.uploads: dict[int, tuple[float, float]] = {}  # round → began, ended
        self.clients = 1  # how many take part, as the newest start said
        self._gone: Gone | None = None
        self._failure: BaseException | None = None
        self._interrupted = False
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._inbox: Inbox | None = None  # these two from `prepared` on
        self._outbox: Outbox | None = None
        self._masking: MaskingOutbox | None = None  # in its place, where contributions are masked
        # Routing ids that begin with a zero byte are ZeroMQ's own.
        self._identity = b"w" + bytes.fromhex(session)
        self._context = context
        self._socket = self._connected()
        log.info("calling the broker at %s as %s", endpoint, name)
        self.handle(Tick())

    @property
    def gone(self) -> Gone | None:
        return self._gone

    def prepared(self, prepared: Prepared, staging: Staging, residuals: Mapping[int, Vector] | None = None) -> None:
        """Model and data are loaded; blocks may come and go. residuals: see `Outbox`."""
        self._inbox = Inbox(prepared.config, prepared.manifest, staging, self._fail)
        if prepared.config.secure.enabled:
            self._masking = MaskingOutbox(prepared.config, self._ready, self._unfit, self._fail)
        else:
            told = self._ready, self._on_disk, self._fetched, self._fail
            self._outbox = Outbox(prepared.config, *told, residuals)
        self.handle(prepared)

    def contribute(self, contribution: Contribute, delta: Leaving) -> tuple[bool, Future[Encoding] | None]:
        """Send a delta, which may still be on its way from the device. Whether it is of use, and what it becomes (see
        `Outbox.put`)."""
        wanted = self.participant.wants(contribution.round)
        self.handle(contribution)
        if not wanted:
            return False, None  # nothing of it is sent, so nothing is encoded, and no residual moves
        if self._masking is not None:
            self._masking.put(contribution.round, delta, contribution.weight)
            return True, None
        assert self._outbox is not None
        return True, self._outbox.put(contribution.round, contribution.block, delta)

    def stored(self, round: int, delta: Spillable, file: Reader) -> None:
        """A delta that may be on its way is on disk, and need not be in memory. From any thread.

        Under masks it is not what is sent, and encoded anew with others, until its round is closed.
        """
        if self._outbox is not None:
            self._outbox.stored(round, delta, file)

    def handle(self, event: Event) -> None:
        """Give the participant an event and perform what it asks for."""
        now = time.monotonic()
        for effect in self.participant.handle(event, now):
            match effect:
                case Send(envelope):
                    self._socket.send(envelope.frames)
                case Prepare(config, name):
                    self.terms, self.name = config, name
                case Started():
                    self.started = effect
                    self.clients = effect.clients
                case Mask(round, masker):
                    assert self._masking is not None
                    self._masking.mask(round, masker)
                case Fetch(round, index, stored):
                    assert self._outbox is not None
                    self._outbox.fetch(round, index, stored)
                case Took(round, block, attempt, index, payload):
                    assert self._inbox is not None
                    self._inbox.take(round, block, attempt, index, payload)
                case Dropped(round, attempt):
                    assert self._inbox is not None
                    self._inbox.drop(round, attempt)
                case Arrived():
                    assert self._inbox is not None
                    self.arrivals.append(self._inbox.deliver(effect))
                case Uploaded(round, began, ended):
                    self.uploads[round] = (began, ended)
                case Dismissed(round, reason):
                    log.warning("the contribution to round %d was not counted: %s", round, reason)
                case Deferred(round):
                    log.info("the contribution to round %d may still count in the next round of its block", round)
                case Settled(round, into, reason) if into < 0:
                    log.warning("the late contribution to round %d was not counted after all: %s", round, reason)
                case Settled(round, into):
                    log.info("the late contribution to round %d was counted in round %d", round, into)
                case Notice(text):
                    log.info("%s", text)
                case Gone():
                    self._gone = effect
                    self._on_gone()
        if self._masking is not None:
            self._masking.closed(self.participant.told)
        if not isinstance(event, Progress):
            self._changed.set()
            self._set_timer(now)

    def _ready(self, round: int, chunk: Encoded) -> None:
        self.handle(Ready(round, chunk))

    def _on_disk(self, round: int, again: tuple[Callable[[], Buffer], ...]) -> None:
        self.handle(OnDisk(round, again))

    def _fetched(self, round: int, index: int, chunk: Encoded) -> None:
        self.handle(Fetched(round, index, chunk))

    def _unfit(self, round: int, reason: str) -> None:
        self.handle(Withdraw(round, reason))

    def step(self, round: int, step: int) -> None:
        """Training has come so far. From any thread."""
        self._loop.call_soon_threadsafe(self.handle, Progress(round, step))

    def fail(self, context: dict[str, Any]) -> None:
        """A callback of the loop has failed, which is a bug of ours: whoever waits in `until` gets the exception."""
        self._fail(context.get("exception") or RuntimeError(context["message"]))

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._changed.set()
        self._on_gone()

    def interrupt(self) -> None:
        """Whoever waits in `until` shall stop waiting: the user wants to leave."""
        self._interrupted = True
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at after every event. Raises SessionEnded or Interrupted."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._gone is not None:
                raise SessionEnded(self._gone)
            if self._interrupted:
                raise Interrupted
            if condition():
                return
            self._changed.clear()
            await self._changed.wait()

    async def leave(self, reason: str) -> Gone:
        """Say goodbye, and wait for the answer for as long as the participant thinks right."""
        self.handle(Finish(reason))
        while self._gone is None:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        return self._gone

    def close(self) -> None:
        for timer in (self._timer, self._again):
            if timer is not None:
                timer.cancel()
        self._timer = self._again = None
        for box in (self._inbox, self._outbox, self._masking):
            if box is not None:
                box.close()
        lost = self._gone is not None and self._gone.end is End.LOST
        self._socket.close(linger_ms=0 if lost else 2000)

    def _connected(self) -> DealerSocket:
        return DealerSocket(
            self._endpoint, self._identity, self._on_frames, self._context, self._credentials, self._on_handshake
        )

    def _connect_anew(self) -> None:
        """libzmq does not, after a refusal. What waits to be sent is lost with the socket, as with a connection."""
        self._again = None
        if self._gone is None:
            self._socket.close(linger_ms=0)
            self._socket = self._connected()

    def _on_frames(self, frames: list[memoryview]) -> None:
        try:
            envelope = wire.decode(frames)
        except wire.WireError as error:
            log.error("the broker sent something that is no message: %s", error)
            return
        self.handle(Received(envelope))

    def _on_handshake(self, handshake: Handshake) -> None:
        assert self._credentials is not None
        if handshake is Handshake.DENIED:
            self._denied(denied(self._endpoint, self._credentials))
        elif handshake is Handshake.DONE:
            self._failed_handshakes = 0
            self._refusals.done()
        else:
            self._failed_handshakes += 1
            if self._failed_handshakes == _TELLING_FAILURES:
                log.warning("%s; trying on", failed(self._endpoint, self._credentials))

    def _denied(self, reason: str) -> None:
        delay_s = self._refusals.denied()
        if delay_s is None:
            self.handle(Denied(reason))
            return
        if self._refusals.new:
            log.warning("%s; it may as well be somebody on the way who says so, and we try again", reason)
        if self._again is None:
            self._again = self._loop.call_later(delay_s, self._connect_anew)

    def _set_timer(self, now: float) -> None:
        due = self.participant.deadline()
        if self._timer is not None:
            if self._gone is None and self._timer_due <= due:
                return  # it looks again when it goes off
            self._timer.cancel()
            self._timer = None
        if self._gone is None:
            self._timer_due = due
            self._timer = self._loop.call_later(max(due - now, 0.0) + 1e-3, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.handle(Tick())
