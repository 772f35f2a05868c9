"""The guard of the broker's socket: which connections there are, what has come on each, and which of them must go.

What is here is below messages: libzmq closes no single connection of a socket, keeps what it has of a message until the
last frame is there, however many there are, and takes as many connections as come. So each connection's own descriptor
is looked at (libzmq's monitor and `zmq.SRCFD` name it), and shut down where

    the coordinator says so                           `drop`; half a second later, so that the reason still arrives.
                                                      Who has said nothing yet goes too: it may have the same key
    something comes by a key that was revoked         `condemn`
    far more has come of it than was taken from it    endless messages; all of a client's connections together
    too many have said nothing yet                    one of the address that has most of them: its newest, as others
                                                      are nearer to saying something, or one that never will
    one client has too many                           its oldest
    another one speaks under its routing id           which libzmq hands over, and leaves the first one mute: so its
                                                      owner comes again, and takes back what was stolen
    nothing is read there of what is sent             by the socket, which finds its queue full

libzmq finds such a connection closed by its peer. Who had it is told (`on_broken`) and may be held to account; this
module knows neither messages nor quotas. A descriptor may be closed and its number given to another at any moment by
libzmq's thread, so none is kept: it is taken hold of when it is needed, and used only if it is still the same socket.
And what is read may be of who had the descriptor before, until nothing has been left to read once since the connection
was there. Until then it is not known whose it is: what has come is counted, it may be closed, and nobody is blamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from broker.descriptors import Grip, allowed, identity
from parablock.coordinator_events import NOBODY

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from broker.descriptors import Identity

LOOK_S = 0.1
"""Between two looks at what has come."""

WINDOWS = 4
"""Times what an honest worker may have under way may be waiting to be taken from all connections of a client."""

MOST_SILENT = 256
"""So many connections may have said nothing yet, or two for each client where that is more."""

LONG_S = 15.0
"""Who has said nothing for so long, longer than a handshake may take, will not say anything."""

MOST_OF_CLIENT = 8
"""So many connections may a client have: its worker's, one that is half open since it came back, `parablock plan`."""

_LAST_WORDS_S = 0.5
_OTHER_FILES = 128  # descriptors that are no connections
_GREETING_BYTES = 2048  # a handshake has fewer
_ENDPOINT = "inproc://guard"
_BYTES_RECEIVED = struct.Struct("=Q")
_BYTES_RECEIVED_AT = 128  # tcpi_bytes_received in Linux's struct tcp_info
_info = ctypes.create_string_buffer(_BYTES_RECEIVED_AT + _BYTES_RECEIVED.size)


def _watches() -> bool:
    if sys.platform != "linux":
        return False
    with socket.socket() as probe:
        return len(probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, len(_info))) == len(_info)


WATCHES = _watches()
"""Whether it can be seen how much has come of a connection: by TCP_INFO of Linux 4.1 or newer."""

_getsockopt = ctypes.CDLL(None).getsockopt if WATCHES else None


@dataclass
class Connection:
    """descriptor: libzmq's, which may be closed, and be another's by now; socket: which one it was. since: when it
    was accepted, and condemned: when it was dropped, in seconds. taken: bytes that were read of it, as they travel.

    sure: what is read under its descriptor is its own. client: whose key it has. peer: the routing id of what it said
    last; None: it has said nothing, as far as is sure. claimed: both, of what was read last while nothing was sure.
    """

    descriptor: int
    socket: Identity
    address: str
    since: float
    taken: int = _GREETING_BYTES
    sure: bool = False
    client: str | None = None
    peer: bytes | None = None
    claimed: tuple[bytes, str | None] | None = None
    condemned: float | None = None

    @property
    def silent(self) -> bool:
        return self.peer is None and self.claimed is None

    def is_of(self, peer: bytes, client: str | None) -> bool:
        """Whether it may be this client's, or this peer's where that is not sure."""
        if client is not None and self.client == client:
            return True
        if self.claimed is None:
            return False
        return self.claimed[0] == peer or (client is not None and self.claimed[1] == client)


class Guard:
    """Of one socket that is not bound yet; `listen` begins the looking. encrypted: whether connections have keys."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], watched: zmq.Socket[bytes], *, encrypted: bool) -> None:
        self._encrypted = encrypted
        self._watched = watched
        watched.monitor(_ENDPOINT, int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED))
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.set(zmq.RCVHWM, 0)  # libzmq's thread would wait for us
        self._monitor.set(zmq.LINGER, 0)
        self._monitor.connect(_ENDPOINT)
        self._events = cast("int", self._monitor.get(zmq.FD))
        self._grip = Grip()
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._unsure: list[Connection] = []
        self._speaking: dict[bytes, Connection] = {}  # by routing id: where it was heard last
        self._most = max(allowed() - _OTHER_FILES, 8)
        self._most_silent = MOST_SILENT
        self._most_behind = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def listen(
        self,
        loop: asyncio.AbstractEventLoop,
        window_bytes: int,
        most_message_bytes: int,
        on_broken: Callable[[bytes, str, str | None], None],
        read: Callable[[], None],
        clients: int,
    ) -> None:
        """From now on look, and call `on_broken(peer, reason, client)` for each connection that must go; peer: NOBODY
        for one that has said nothing. window_bytes: what an honest worker may have under way. clients: how many are
        awaited. read: have the socket be read soon, until nothing is left (`drained`)."""
        self._on_broken, self._read = on_broken, read
        self._most_silent = max(MOST_SILENT, 2 * clients)
        self._most_behind = WINDOWS * window_bytes + most_message_bytes
        self._loop = loop
        loop.add_reader(self._events, self._read_monitor)
        self._read_monitor()  # the descriptor is edge-triggered
        self._look()

    def close(self) -> None:
        """Before the watched socket."""
        if self._loop is not None:
            self._loop.remove_reader(self._events)
        if self._timer is not None:
            self._timer.cancel()
        self._watched.disable_monitor()
        self._monitor.close()
        self._grip.close()

    # What the socket says

    def took(self, descriptor: int, peer: bytes, client: str | None, lengths: Iterable[int]) -> bool:
        """A message was read; whether it is to be looked at. lengths: bytes of its frames, routing id left out."""
        connection = self._connection(descriptor)
        if connection is None:
            return True  # closed since
        connection.taken += sum(map(self._travelling, lengths))
        if connection.condemned is not None:
            return False
        if not connection.sure:
            connection.claimed = peer, client
            return True
        if self._speaking.get(peer) is not connection:
            self._silence(peer, connection)
            self._speaking[peer] = connection
            connection.peer, connection.client, connection.claimed = peer, client, None
            self._limit(client)
        return True

    def drained(self) -> None:
        """Nothing is left to read: what comes from now on is of the connections that there are."""
        for connection in self._unsure:
            connection.sure = True
        self._unsure.clear()

    def drop(self, peer: bytes, client: str | None) -> None:
        """Take nothing more from where `peer` was heard last, nor from any connection of the client, and close them
        after what was sent to them. Those that have said nothing may be the client's: they go at once, as nothing was
        sent to them either, and honest ones come again."""
        if client is not None:
            self._read_monitor()
            for connection in self._connections.values():
                if connection.silent:
                    self._condemn(connection, at_once=True)
        dropped = [each for each in self._connections.values() if each.is_of(peer, client)]
        if peer in self._speaking:
            dropped.append(self._speaking[peer])
        for connection in dropped:
            self._condemn(connection)

    def condemn(self, descriptor: int, peer: bytes) -> None:
        """What came on this connection, under the routing id `peer`, is nobody's. Who has spoken there before may still
        be told why."""
        connection = self._connection(descriptor)
        if connection is None:
            return  # closed since
        self._condemn(connection, at_once=connection.peer is None)
        self._silence(peer, connection)

    def _silence(self, peer: bytes, newer: Connection) -> None:
        """Close where `peer` was heard before, or may have been: it is mute since this one has its routing id, and its
        owner comes again."""
        claiming = [each for each in self._connections.values() if each.claimed is not None and each.claimed[0] == peer]
        before = self._speaking.get(peer)
        for each in claiming if before is None else [before, *claiming]:
            if each is not newer:
                self._shut_down(each)

    def full(self, peer: bytes) -> None:
        """What was sent to this peer is not read, and no more can be."""
        connection = self._speaking.get(peer)
        if connection is not None and connection.condemned is None:
            self._break(connection, "it does not read what is sent to it")

    def _connection(self, descriptor: int) -> Connection | None:
        """On which something came just now; None if it is closed since."""
        if descriptor not in self._connections:
            self._read_monitor()
        return self._connections.get(descriptor) or self._accepted(descriptor)

    # What the monitor says

    def _read_monitor(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                if event["event"] == zmq.EVENT_ACCEPTED:
                    self._accepted(event["value"])
                elif event["value"] in self._connections:
                    self._forget(self._connections[event["value"]])

    def _accepted(self, descriptor: int) -> Connection | None:
        """Note a connection; None if it is closed already."""
        if descriptor in self._connections:
            self._forget(self._connections[descriptor])  # libzmq says nothing of those that it closes by itself
        with self._grip.hold(descriptor) as held:
            if held is None:
                return None
            same, found = held
            try:
                name = same.getpeername()
            except OSError:
                return None
        if not isinstance(name, tuple):
            return None  # of a socket of another family, which has the descriptor by now
        now = time.monotonic()
        connection = Connection(descriptor, found, str(name[0]), now)
        self._connections[descriptor] = connection
        self._unsure.append(connection)
        if self._loop is not None:
            self._read()
        standing = [each for each in self._connections.values() if each.condemned is None]
        silent = [each for each in standing if each.silent]
        if len(silent) > self._most_silent or len(standing) > self._most:
            crowded = Counter(each.address for each in silent).most_common(1)[0][0]
            there = [each for each in silent if each.address == crowded]
            one = there[0] if now >= there[0].since + LONG_S else there[-1]
            self._break(one, f"too many connections that say nothing, most of them from {crowded}")
        return connection

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.descriptor]
        if connection.peer is not None and self._speaking.get(connection.peer) is connection:
            del self._speaking[connection.peer]

    # What is found

    def _limit(self, client: str | None) -> None:
        if client is not None:
            of_client = [each for each in self._connections.values() if each.client == client]
            for connection in of_client[:-MOST_OF_CLIENT]:
                self._shut_down(connection)

    def _look(self) -> None:
        """At every connection: whether it is still there, is to be closed, or has sent far more than was taken."""
        assert self._loop is not None
        now = time.monotonic()
        behind: defaultdict[str | int | None, list[tuple[int, Connection]]] = defaultdict(list)
        for connection in list(self._connections.values()):
            if connection.condemned is not None and now >= connection.condemned + _LAST_WORDS_S:
                self._shut_down(connection)
            received = _received(connection)
            if received is None:
                self._forget(connection)
            elif received > connection.taken:
                behind[self._account(connection)].append((received - connection.taken, connection))
        for found in behind.values():
            if sum(nbytes for nbytes, _ in found) > self._most_behind:
                nbytes, worst = max(found, key=lambda each: each[0])
                self._break(worst, f"{nbytes >> 20} MiB of messages without an end, or faster than they can be read")
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _account(self, connection: Connection) -> str | int | None:
        """On whose account it is what waits: a client's, the connection's own, or that of all who have said nothing."""
        if connection.client is not None:
            return connection.client
        return None if connection.silent else connection.descriptor

    def _condemn(self, connection: Connection, *, at_once: bool = False) -> None:
        """Take nothing more of it, and close it: after last words, or at once."""
        if connection.condemned is None:
            connection.condemned = time.monotonic()
        if at_once:
            self._shut_down(connection)

    def _break(self, connection: Connection, reason: str) -> None:
        """Close it at once, and say so, if it is still there."""
        assert self._loop is not None
        connection.condemned = time.monotonic()
        if self._shut_down(connection):
            self._loop.call_soon(self._on_broken, connection.peer or NOBODY, reason, connection.client)

    def _shut_down(self, connection: Connection) -> bool:
        """Both ways: libzmq reads to the end, and closes it. False if it has done so before, whoever has its descriptor
        by now."""
        with self._grip.hold(connection.descriptor) as held:
            if held is None or held[1] != connection.socket:
                return False
            with contextlib.suppress(OSError):  # the peer has closed it meanwhile
                held[0].shutdown(socket.SHUT_RDWR)
            return True

    def _travelling(self, length: int) -> int:
        """Bytes of a frame with what ZMTP 3.1 puts around it; with CURVE that is a command in a frame."""
        if self._encrypted:
            length += 33
        return length + (2 if length < 256 else 9)


def _received(connection: Connection) -> int | None:
    """Bytes that have come, as far as that can be seen; None where it is no connection (any more).

    By the C library's getsockopt: a socket object of Python's takes five system calls, ten times a second for each.
    """
    if _getsockopt is None:
        return 0 if identity(connection.descriptor) == connection.socket else None
    length = ctypes.c_uint32(len(_info))
    if _getsockopt(connection.descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, _info, ctypes.byref(length)):
        return None
    received: int = _BYTES_RECEIVED.unpack_from(_info, _BYTES_RECEIVED_AT)[0]
    return received
