"""The worker's DEALER socket on the event loop: frames in, frames out, no protocol.

One reader for the life of the socket, driven by readiness and never cancelled. ZeroMQ reconnects by itself with a
growing interval; whether anybody is at the other end is the participant's business. What was accepted for sending may
be lost with a connection, so nothing here counts as delivered.

Payloads are sent uncopied: whoever hands over a buffer does not write to it any more. What the broker sends in several
frames (`broker.socket` says why) is put together here.

ZeroMQ's thread is scheduled as a batch job, where that exists: it wakes for every few packets, and shall not push the
torch thread out each time. It gets its share of the processor as before, a few milliseconds later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import zmq

from parablock import wire
from workers.handshakes import Handshakes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parablock.keys import SecretKey
    from workers.handshakes import OnHandshake

_BURST = 64
"""Messages taken per wake-up, before other callbacks of the loop have their turn."""

_HANDSHAKE_MS = 10_000
"""Longest time that the broker may take to show its key, and to answer for ours."""

_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    context = zmq.Context()
    if sys.platform == "linux":
        context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
    return context


@dataclass(frozen=True)
class Credentials:
    """What both sides of an encrypted connection show. secret: our own. broker: its public key, Z85."""

    secret: SecretKey
    broker: str

    @property
    def public(self) -> str:
        """Of our own secret key, Z85."""
        return zmq.curve_public(self.secret.key.encode()).decode()


class DealerSocket:
    """Connected to `endpoint` under the routing id `identity`; `on_frames(frames)` is called on the loop.

    context: shared with other sockets of the process, and left to whoever made it; without one, the socket's own.
    credentials: None: unencrypted. on_handshake: see `workers.handshakes`; of an encrypted connection only.
    Raises zmq.ZMQError where `endpoint` is no address.
    """

    def __init__(
        self,
        endpoint: str,
        identity: bytes,
        on_frames: Callable[[list[memoryview]], None],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        credentials: Credentials | None = None,
        on_handshake: OnHandshake | None = None,
    ) -> None:
        self._on_frames = on_frames
        self._context_is_shared = context is not None
        self._context = context or _context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.ROUTING_ID, identity)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES + wire.MAX_HEADER_BYTES)
        self._socket.set(zmq.LINGER, 3000)
        self._socket.set(zmq.IPV6, "[" in endpoint)
        self._socket.set(zmq.RECONNECT_IVL, 100)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)  # or a broker that is back after 10 s is found after 5 more
        self._socket.set(zmq.TCP_KEEPALIVE, 1)
        self._socket.set(zmq.TCP_KEEPALIVE_IDLE, 60)
        self._socket.set(zmq.TCP_KEEPALIVE_INTVL, 10)
        self._socket.set(zmq.TCP_KEEPALIVE_CNT, 6)
        self._socket.set(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._handshakes: Handshakes | None = None
        if credentials is not None:
            self._socket.set(zmq.CURVE_SERVERKEY, credentials.broker.encode())
            self._socket.set(zmq.CURVE_PUBLICKEY, credentials.public.encode())
            self._socket.set(zmq.CURVE_SECRETKEY, credentials.secret.key.encode())
            if on_handshake is not None:
                self._handshakes = Handshakes(self._socket, on_handshake)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError:
            self._unwatch()
            self._socket.close(linger=0)
            if not self._context_is_shared:
                self._context.term()
            raise
        self._draining = False
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = cast("int", self._socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)

    def send(self, frames: Sequence[bytes | memoryview]) -> None:
        """Lost at once where the broker's address has refused our key: libzmq connects no more then."""
        header, *payload = frames
        with contextlib.suppress(zmq.Again):  # at the first frame: nowhere to send to
            self._socket.send(header, _MORE if payload else _LAST)
            for frame in payload:
                self._socket.send(frame, _LAST, copy=False)
        self._wake()

    def close(self, linger_ms: int) -> None:
        """Stop reading, and let what was sent leave for at most `linger_ms`."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self._unwatch()
            self._socket.close(linger=linger_ms)
            if not self._context_is_shared:
                self._context.term()

    def _unwatch(self) -> None:
        if self._handshakes is not None:
            self._handshakes.close()

    def _wake(self) -> None:
        """The descriptor is edge-triggered, and sending may have consumed the edge: look once more."""
        if not self._draining:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._draining = False
        for _ in range(_BURST):
            if self._closed:
                return
            try:
                frames = [frame.buffer for frame in self._socket.recv_multipart(zmq.NOBLOCK, copy=False)]
            except zmq.Again:
                return
            self._on_frames(_put_together(frames))
        self._wake()


def _put_together(frames: list[memoryview]) -> list[memoryview]:
    """The header and the whole payload; what is too long for one stays as it came, and is no message to `wire`."""
    if len(frames) <= 2 or sum(frame.nbytes for frame in frames[1:]) > wire.MAX_PAYLOAD_BYTES:
        return frames
    return [frames[0], memoryview(b"".join(frames[1:]))]
