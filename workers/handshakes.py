"""What becomes of a socket's handshakes: libzmq says nothing of them on the socket itself, and tries for ever.

DONE      the broker knows our key, and has its own
DENIED    the broker has said that our key is not allowed, or so has anybody on the way to it: a refusal is not
          encrypted. libzmq does not try again after it
FAILED    the connection was closed in the middle: the broker has another key than we were told, or bars us for
          now, or it is no encrypted broker at all, or the link broke. It cannot be told which
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from parablock import keys

if TYPE_CHECKING:
    from workers.socket import Credentials


class Handshake(Enum):
    DONE = "done"
    DENIED = "denied"
    FAILED = "failed"


OnHandshake = Callable[[Handshake], None]

_MEANINGS = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: Handshake.DONE,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Handshake.DENIED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Handshake.FAILED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Handshake.FAILED,
}


class Handshakes:
    """Of one socket, from before it connects until `close`, on the running loop."""

    def __init__(self, socket: zmq.Socket[bytes], on_handshake: OnHandshake) -> None:
        self._socket = socket
        self._on_handshake = on_handshake
        self._monitor = socket.get_monitor_socket(int(sum(_MEANINGS)))
        self._loop = asyncio.get_running_loop()
        self._descriptor = cast("int", self._monitor.get(zmq.FD))
        self._closed = False
        self._loop.add_reader(self._descriptor, self._drain)
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        """To be called before the socket is closed."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._descriptor)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)

    def _drain(self) -> None:
        while not self._closed and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            meaning = _MEANINGS.get(zmq.Event(event["event"]))
            if meaning is not None:
                self._on_handshake(meaning)


class Refusals:
    """What to do about the denials of one broker's address: by itself none of them proves anything.

    Three in a row that are seconds apart are believed by a process that has never been let in. One that was is told in
    its session, under encryption, should its key be revoked; so it tries on for as long as it has patience.
    """

    MOST = 3

    def __init__(self, first_s: float = 1.0, longest_s: float = 30.0) -> None:
        """first_s: seconds until the first try after a denial, and after each one that follows twice as long."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._number = 0  # since a handshake was done
        self._ever = False

    def done(self) -> None:
        self._ever, self._number = True, 0

    def denied(self) -> float | None:
        """Seconds until the next try; None: there shall be none."""
        self._number += 1
        if self._number >= self.MOST and not self._ever:
            return None
        return min(self._first_s * 2.0 ** (self._number - 1), self._longest_s)

    @property
    def new(self) -> bool:
        """Whether it is the first one, of which the user is told."""
        return self._number == 1


def denied(endpoint: str, credentials: Credentials) -> str:
    """What to do where the broker denies our key."""
    name, public = credentials.secret.name, keys.fingerprint(credentials.public)
    return (
        f"the broker at {endpoint} does not let our key in (fingerprint {public}): give its owner {name}.public, to be "
        "let in with `parablock keys allow`; or take another of your keys with --key"
    )


def failed(endpoint: str, credentials: Credentials) -> str:
    """What it may be where connections end in the handshake."""
    return (
        f"{endpoint} answers, and the handshake fails: the broker has another key than the invite says (fingerprint "
        f"{keys.fingerprint(credentials.broker)}), and then ask its owner for a new invite; or it keeps us out for a "
        "while; or what listens there is no encrypted broker, or a link that does not reach it"
    )
