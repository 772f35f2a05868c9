"""The broker's ROUTER socket on the event loop: frames in, frames out, no protocol.

One reader for the life of the socket, driven by readiness and never cancelled; it drains many messages per wake-up,
so that a burst of chunks costs one pass through the loop. Sending never blocks and never drops in silence: ROUTER is
mandatory, and what may be under way is bounded by the credit of the transfers, not by the high-water marks: only a peer
that reads nothing at all reaches the one on the way out, and is cut off; the one on the way in makes a flood wait in
its sender. Connections that must go are `broker.guard`'s business.

With a door (`broker.authenticator`) every connection is encrypted (CURVE), and each message says which client's key it
came by; without one nothing is, and nobody is known.

Payloads are sent uncopied: whoever hands over a buffer does not write to it any more. Where they are encrypted they
leave in frames that are the shorter the more clients there are, and the worker puts them together: libzmq encrypts a
frame at once, and holds all of it until the kernel has taken it, for each connection.

ZeroMQ's thread is scheduled as a batch job, where that exists: it wakes for every few packets, and shall not push out
whoever is computing each time. It gets its share of the processor as before, a few milliseconds later.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from typing import TYPE_CHECKING, cast

import zmq

from broker.authenticator import DOMAIN
from broker.guard import Guard
from parablock import wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.authenticator import Authenticator

    OnFrames = Callable[[bytes, list[memoryview], str | None], None]
    OnBroken = Callable[[bytes, str, str | None], None]

_BURST = 64
"""Messages taken per wake-up, before other callbacks of the loop have their turn."""

_MOST_FRAMES = 4
"""Of one message, its peer's routing id among them: one more than any has. It is handed over then, and what else comes
of it is passed over."""

_PASSED_OVER = 4096
"""Frames of such a message that are passed over per wake-up: a client may have a million of them under way."""

_MOST_MESSAGE_BYTES = wire.MAX_PAYLOAD_BYTES + wire.MAX_HEADER_BYTES

_MOST_UNREAD = 1 << 16
"""Messages that wait for one peer to read them. A window of the smallest chunks is a quarter of that."""

_MOST_WAITING = 256
"""Messages of one connection that wait for us; what comes beyond them stays with the sender."""

_ENCRYPTED_BYTES = 1 << 20
"""Of payloads on their way out, what frames may have that leave at once, one for each client."""

_LEAST_FRAME_BYTES = 128 << 10
"""With shorter ones messages cost more than is saved (README, Decisions)."""

_WINDOW_BYTES = 16 << 20  # the default of network.window_bytes

HANDSHAKE_MS = 10_000
"""Longest time that a connection may take to say who it is."""

_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


class BindError(ValueError):
    """The broker cannot listen where it should; the text says why and what to do."""


class RouterSocket:
    """Bound to `endpoint` from its making; `listen` starts the reader.

    door: who lets clients in, closed with the socket; None: unencrypted. It stands before the socket is bound, and lets
    nobody past the handshake before `listen`. Without one, what arrives before that is kept, and nothing limits it.
    """

    def __init__(self, endpoint: str, door: Authenticator | None = None) -> None:
        self.door = door
        self._context = zmq.Context()
        if sys.platform == "linux":
            self._context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.SNDHWM, _MOST_UNREAD)
        self._socket.set(zmq.RCVHWM, _MOST_WAITING)
        self._socket.set(zmq.MAXMSGSIZE, _MOST_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 3000)
        self._socket.set(zmq.IPV6, "[" in endpoint)
        self._socket.set(zmq.TCP_KEEPALIVE, 1)
        self._socket.set(zmq.TCP_KEEPALIVE_IDLE, 60)
        self._socket.set(zmq.TCP_KEEPALIVE_INTVL, 10)
        self._socket.set(zmq.TCP_KEEPALIVE_CNT, 6)
        self._socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._guard = Guard(self._context, self._socket, encrypted=door is not None)
        if door is not None:
            door.open(self._context, hold=True)
            self._socket.set(zmq.CURVE_SERVER, 1)
            self._socket.set(zmq.CURVE_SECRETKEY, door.secret.key.encode())
            self._socket.set(zmq.ZAP_DOMAIN, DOMAIN)
            self._socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a door nobody gets in, instead of anybody
        self._draining = False
        self._amid = False  # a message that has too many frames was handed over, and not all of them are read
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._guard.close()
            self._socket.close(linger=0)
            self._end()
            if error.errno == errno.EADDRINUSE:
                raise BindError(
                    f"{endpoint} is in use, perhaps by another broker; choose another port with "
                    "--set network.bind=tcp://127.0.0.1:PORT, or * for a free one"
                ) from error
            raise BindError(f"cannot listen on {endpoint}: {error.strerror}; expected tcp://ADDRESS:PORT") from error
        self.endpoint = cast("bytes", self._socket.get(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        self._descriptor = cast("int", self._socket.get(zmq.FD))

    def listen(
        self,
        on_frames: OnFrames,
        on_broken: OnBroken = lambda *_: None,
        window_bytes: int = _WINDOW_BYTES,
        clients: int = 1,
    ) -> None:
        """From now on call `on_frames(peer, frames, client)` on the running loop for each message, and
        `on_broken(peer, reason, client)` for each connection that was cut off (see `Guard.listen`).

        client: whose key it came by; None without a door. clients: how many are awaited.
        """
        self._on_frames = on_frames
        shortened = max(_ENCRYPTED_BYTES // clients, _LEAST_FRAME_BYTES)
        self._frame_bytes = shortened if self.door is not None else wire.MAX_PAYLOAD_BYTES
        self._loop = asyncio.get_running_loop()
        self._guard.listen(self._loop, window_bytes, _MOST_MESSAGE_BYTES, on_broken, self._wake, clients)
        self._loop.add_reader(self._descriptor, self._drain)
        self._wake()
        if self.door is not None:
            self.door.admit()

    def send(self, peer: bytes, frames: list[bytes | memoryview | zmq.Frame]) -> bool:
        """Hand a message to `peer`, from when `listen` was called; false if no such peer is connected (any more).

        A payload in `frames`, bytes of format "B", is made frames of ZeroMQ's there, once, and shared by all whom the
        list is sent to.
        """
        header, *payload = frames
        if payload and isinstance(payload[0], memoryview):
            payload = frames[1:] = _divided(payload[0], self._frame_bytes)
        try:
            self._socket.send(peer, _MORE)
            self._socket.send(header, _MORE if payload else _LAST)
            for number, frame in enumerate(payload, 1):
                self._socket.send(frame, _MORE if number < len(payload) else _LAST, copy=False)
        except zmq.ZMQError as error:
            if error.errno == errno.EAGAIN:
                self._guard.full(peer)
            elif error.errno != errno.EHOSTUNREACH:
                raise
            return False
        finally:
            self._wake()
        return True

    def drop(self, peer: bytes, client: str | None) -> None:
        """Take nothing more from `peer`, nor from any connection with the key of `client`, and close them after what
        was sent to them."""
        self._guard.drop(peer, client)

    def close(self) -> None:
        """Stop reading, let what was sent leave (for at most LINGER), and free the port."""
        if not self._closed:
            self._closed = True
            if self._loop is not None:
                self._loop.remove_reader(self._descriptor)
            self._guard.close()
            self._socket.close()
            self._end()

    def _end(self) -> None:
        if self.door is not None:
            self.door.close()
        self._context.term()

    def _wake(self) -> None:
        """The descriptor is edge-triggered, and sending may have consumed the edge: look once more."""
        if not self._draining and self._loop is not None:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._draining = False
        for _ in range(_BURST):
            if self._closed:
                return
            if self._amid:
                self._pass_over()
                break
            try:
                peer, frames, client, passed = self._receive()
            except zmq.Again:
                self._guard.drained()
                return
            if passed:
                self._on_frames(peer, frames, client)
        self._wake()

    def _receive(self) -> tuple[bytes, list[memoryview], str | None, bool]:
        """One message, or what it takes to see that it has too many frames; whose it is, and whether anybody is to see
        it: not if its key was revoked, or it was dropped."""
        frames: list[memoryview] = []
        more = True
        while more and len(frames) < _MOST_FRAMES:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            frames.append(frame.buffer)
            more = frame.more
        self._amid = more
        peer, client = bytes(frames[0]), None
        if self.door is not None:
            client = self.door.client(cast("str", frame.get("User-Id")))
        descriptor = _descriptor_of(frame)
        if descriptor is None:
            return peer, frames[1:], client, False
        if self.door is not None and client is None:
            self._guard.condemn(descriptor, peer)
            return peer, frames[1:], client, False
        passed = self._guard.took(descriptor, peer, client, (each.nbytes for each in frames[1:]))
        return peer, frames[1:], client, passed

    def _pass_over(self) -> None:
        """Some more frames of a message that has too many; all of it is there. The guard is not told that they were
        taken, as more of them from there is too much all the sooner."""
        for _ in range(_PASSED_OVER):
            if not self._socket.recv(zmq.NOBLOCK, copy=False).more:
                self._amid = False
                return


def _divided(payload: memoryview, most: int) -> list[bytes | memoryview | zmq.Frame]:
    """most: bytes of a frame."""
    return [zmq.Frame(payload[at : at + most], copy=False) for at in range(0, payload.nbytes, most)]


def _descriptor_of(frame: zmq.Frame) -> int | None:
    """Of the connection that it came on. None from a peer that speaks ZMTP 1 or 2, as no worker does: libzmq takes it
    where nothing is encrypted, and tells nothing of it. It stays one that has said nothing to us."""
    try:
        return frame.get(zmq.SRCFD)
    except zmq.ZMQError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
