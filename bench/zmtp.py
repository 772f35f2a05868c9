"""ZMTP 3.1 by hand, over a plain TCP socket: what ZeroMQ itself would never send can be sent with it.

    with Raw(address) as raw:                      with Raw(address) as raw:
        raw.null(b"routing id")                        raw.curve(b"routing id", secret, public, server)
        raw.send(b"header", more=True)                 raw.send(b"header", more=True)

Or step by step: `greeting`, `command`, `frame` and the parts of the CURVE handshake (RFC 26) give bytes, to be spoilt
before they are sent. The boxes are made by the libsodium that comes with pyzmq. For hostile peers in tests and
benchmarks; nothing else should speak so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import socket
import struct
from pathlib import Path
from typing import Self

import zmq

MORE, LARGE, COMMAND = 1, 2, 4

_PATIENCE_S = 5.0


class Closed(ConnectionError):
    """The other side has closed the connection, or does not answer."""


def address(endpoint: str) -> tuple[str, int]:
    """Of tcp://HOST:PORT."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def greeting(mechanism: bytes = b"NULL", version: tuple[int, int] = (3, 1)) -> bytes:
    """64 bytes; ZMTP's first."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes(version) + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame as it travels. flags: MORE, COMMAND; LARGE by itself."""
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return header(len(body), flags) + body


def header(length: int, flags: int = 0) -> bytes:
    """Of a frame that is announced to be so long, whatever follows."""
    return struct.pack(">BQ", flags | LARGE, length)


def command(name: bytes, body: bytes) -> bytes:
    return frame(bytes((len(name),)) + name + body, COMMAND)


def metadata(routing_id: bytes, kind: bytes = b"DEALER") -> bytes:
    properties = ((b"Socket-Type", kind), (b"Identity", routing_id))
    return b"".join(bytes((len(key),)) + key + struct.pack(">I", len(value)) + value for key, value in properties)


class Raw:
    """A connection on which anything can be sent. Every wait ends after a few seconds, with Closed."""

    def __init__(self, address: tuple[str, int], patience_s: float = _PATIENCE_S) -> None:
        self._socket = socket.create_connection(address, patience_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._boxes: _Boxes | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def put(self, data: bytes) -> None:
        """As it is. Raises Closed."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from error

    def get(self, length: int) -> bytes:
        """So many bytes. Raises Closed."""
        found = b""
        while len(found) < length:
            try:
                part = self._socket.recv(length - len(found))
            except OSError as error:
                raise Closed(str(error)) from error
            if not part:
                raise Closed("closed by the other side")
            found += part
        return found

    def get_frame(self) -> tuple[int, bytes]:
        """Flags and body of the next frame, as it travels. Raises Closed."""
        (flags,) = self.get(1)
        (length,) = struct.unpack(">Q", self.get(8)) if flags & LARGE else self.get(1)
        return flags, self.get(length)

    def end(self) -> None:
        """Say that nothing more will come; what the other side still says can be read."""
        self._socket.shutdown(socket.SHUT_WR)

    def closed(self) -> bool:
        """Wait until the other side has closed the connection, reading what it still says; false if it does not."""
        with contextlib.suppress(Closed, TimeoutError):
            while True:
                part = self._socket.recv(1 << 16)
                if not part:
                    return True
        return False

    def null(self, routing_id: bytes) -> None:
        """Without encryption."""
        self.put(greeting())
        self.get(64)
        self.put(command(b"READY", metadata(routing_id)))
        self.get_frame()

    def curve(self, routing_id: bytes, secret: bytes, public: bytes, server: bytes) -> None:
        """With a client's key pair and the server's public key, 32 bytes each. Raises Closed where it is refused."""
        boxes = self.hello(server)
        name, body = self.get_command()
        if name != b"WELCOME":
            raise Closed(f"{name!r} instead of WELCOME")
        self.put(boxes.initiate(body, secret, public, metadata(routing_id)))
        name, _ = self.get_command()
        if name != b"READY":
            raise Closed(f"{name!r} instead of READY")
        self._boxes = boxes

    def hello(self, server: bytes) -> _Boxes:
        """The first half of CURVE's handshake."""
        self.put(greeting(b"CURVE"))
        self.get(64)
        boxes = _Boxes(server)
        self.put(boxes.hello())
        return boxes

    def get_command(self) -> tuple[bytes, bytes]:
        _, body = self.get_frame()
        return body[1 : 1 + body[0]], body[1 + body[0] :]

    def send(self, body: bytes, *, more: bool = False) -> None:
        """A frame of a message, after either handshake. Raises Closed."""
        self.put(self.sealed(body, more=more))

    def sealed(self, body: bytes, *, more: bool = False) -> bytes:
        """A frame of a message as it travels on this connection; each is sent once, in order."""
        flags = MORE if more else 0
        return frame(body, flags) if self._boxes is None else frame(self._boxes.message(body, flags))


class _Boxes:
    """The client's side of CURVE: short-term keys, and what is put into boxes with them."""

    def __init__(self, server: bytes) -> None:
        self._server = server
        self._public, self._secret = key_pair()
        self._server_public = b""
        self._nonce = 0

    def hello(self) -> bytes:
        nonce = self._next()
        box = seal(bytes(64), b"CurveZMQHELLO---" + nonce, self._server, self._secret)
        return command(b"HELLO", bytes((1, 0)) + bytes(72) + self._public + nonce + box)

    def initiate(self, welcome: bytes, secret: bytes, public: bytes, properties: bytes) -> bytes:
        """welcome: the body of that command."""
        opened = unseal(welcome[16:], b"WELCOME-" + welcome[:16], self._server, self._secret)
        self._server_public, cookie = opened[:32], opened[32:]
        vouch_nonce, nonce = os.urandom(16), self._next()
        vouch = seal(self._public + self._server, b"VOUCH---" + vouch_nonce, self._server_public, secret)
        body = public + vouch_nonce + vouch + properties
        box = seal(body, b"CurveZMQINITIATE" + nonce, self._server_public, self._secret)
        return command(b"INITIATE", cookie + nonce + box)

    def message(self, body: bytes, flags: int) -> bytes:
        nonce = self._next()
        box = seal(bytes((flags,)) + body, b"CurveZMQMESSAGEC" + nonce, self._server_public, self._secret)
        return b"\x07MESSAGE" + nonce + box

    def _next(self) -> bytes:
        self._nonce += 1
        return struct.pack(">Q", self._nonce)


@functools.cache
def _libsodium() -> ctypes.CDLL:
    """The one that zmq is linked with, which is mapped already."""
    assert zmq.has("curve"), "this libzmq has no CURVE"
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = re.search(r"(/\S*libsodium\S*)", mapped)
    assert found is not None, "zmq comes without libsodium of its own"
    return ctypes.CDLL(found[1])


def key_pair() -> tuple[bytes, bytes]:
    """(public, secret), 32 bytes each."""
    public, secret = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    _libsodium().crypto_box_keypair(public, secret)
    return public.raw, secret.raw


def seal(body: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    """crypto_box."""
    box = ctypes.create_string_buffer(len(body) + 16)
    failed = _libsodium().crypto_box_easy(box, body, ctypes.c_ulonglong(len(body)), nonce, public, secret)
    assert not failed
    return box.raw


def unseal(box: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    """Raises Closed for what is not from whom it should be."""
    body = ctypes.create_string_buffer(max(len(box) - 16, 0))
    if _libsodium().crypto_box_open_easy(body, box, ctypes.c_ulonglong(len(box)), nonce, public, secret):
        raise Closed("a box that cannot be opened")
    return body.raw
