"""The inside of a user-space link: connections carried through a loop at a rate, with a delay, until a cut.

`Proxy` lives in one event loop and is driven from there; `bench.link` gives it a thread and a face. When bytes
may leave is decided in `bench.shaping`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.shaping import Cut, Lane, Shape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

Address = tuple[str, int]

_BUFFER_S = 0.020
_BUFFER_BYTES = (32 << 10, 1 << 20)
_DRAIN_S = 1.0
_RST_ON_CLOSE = struct.pack("ii", 1, 0)


class _ResetError(Exception):
    """A connection is to be reset at both ends."""


class _Connection:
    """One connection through the link: its two sockets and its state."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near  # whoever connected to the link
        self.far = far  # the target
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.broken = asyncio.Event()

    async def until_broken(self) -> None:
        await self.broken.wait()
        raise _ResetError

    @contextlib.asynccontextmanager
    async def news(self) -> AsyncIterator[None]:
        """Hold back an end's reset for as long as the link is stalled: it does not carry that news either."""
        try:
            yield
        except OSError:
            await self.flowing.wait()
            raise


@dataclass(frozen=True)
class _Piece:
    """Bytes on the way; none at all mark the end of the stream."""

    data: bytes
    deliver_at: float


class _Line:
    """Bytes of one connection that are on the way in one direction. The reader waits while it is full."""

    def __init__(self, capacity: int) -> None:
        self.pieces: asyncio.Queue[_Piece] = asyncio.Queue()
        self._capacity = capacity
        self._held = 0
        self._room = asyncio.Event()
        self._room.set()

    def put(self, piece: _Piece) -> None:
        self._change(len(piece.data))
        self.pieces.put_nowait(piece)

    def landed(self, piece: _Piece) -> None:
        self._change(-len(piece.data))

    async def room(self) -> None:
        await self._room.wait()

    def _change(self, nbytes: int) -> None:
        self._held += nbytes
        if self._held < self._capacity:
            self._room.set()
        else:
            self._room.clear()


class Proxy:
    """What runs in the link's loop."""

    def __init__(self, target: Address, up: Shape, down: Shape, cuts: Sequence[Cut], now: float) -> None:
        self.up = Lane(up, (cut for cut in cuts if cut.direction == "up"), now)
        self.down = Lane(down, (cut for cut in cuts if cut.direction == "down"), now)
        self.stop = asyncio.Event()
        self._target = target
        self._shapes = up, down
        self._timed = [cut for cut in cuts if cut.after_s is not None]
        self._open: set[_Connection] = set()

    def reset(self) -> None:
        for connection in self._open:
            connection.broken.set()
            connection.flowing.clear()  # not one byte more, although its tasks end only later

    def stall(self) -> None:
        for connection in self._open:
            connection.flowing.clear()

    def resume(self) -> None:
        for connection in self._open:
            if not connection.broken.is_set():
                connection.flowing.set()

    def fire(self, cut: Cut) -> None:
        if cut.kind == "reset":
            self.reset()
        else:
            self.stall()

    async def serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(cut.after_s or 0.0, self.fire, cut) for cut in self._timed]
        async with asyncio.TaskGroup() as group:
            loop.add_reader(listener, self._accept, listener, group)
            await self.stop.wait()
            loop.remove_reader(listener)
            self.reset()
        for timer in timers:
            timer.cancel()

    def _accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        # Not `loop.sock_accept`: cancelled at the wrong moment, it loses the connection that it has just accepted.
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            near, _ = listener.accept()
            group.create_task(self._carry(near))

    async def _carry(self, near: socket.socket) -> None:
        up, down = self._shapes
        far = socket.socket()
        connection = _Connection(near, far)
        self._open.add(connection)
        if self.stop.is_set():  # accepted in the link's last moment, after it reset the others
            connection.broken.set()
        try:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            shrink(far, receive=down, send=up)
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(connection.until_broken())
                await asyncio.get_running_loop().sock_connect(far, self._target)
                async with asyncio.TaskGroup() as pumps:
                    for source, sink, lane in ((near, far, self.up), (far, near, self.down)):
                        line = _Line(lane.capacity)
                        pumps.create_task(self._take(connection, source, lane, line))
                        pumps.create_task(self._hand_over(connection, sink, lane, line))
                watch.cancel()
        except* (OSError, _ResetError):
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        finally:
            self._open.discard(connection)
            near.close()
            far.close()

    async def _take(self, connection: _Connection, source: socket.socket, lane: Lane, line: _Line) -> None:
        """Read from the sender at the lane's rate and put what came on the line."""
        loop = asyncio.get_running_loop()
        while True:
            async with connection.news():
                data = await loop.sock_recv(source, lane.quantum)
            if not data:
                line.put(_Piece(b"", loop.time() + lane.delay_s))
                return
            departure = lane.depart(len(data), loop.time())
            line.put(_Piece(data, departure + lane.delay_s))
            await _sleep_until(departure)
            await line.room()

    async def _hand_over(self, connection: _Connection, sink: socket.socket, lane: Lane, line: _Line) -> None:
        """Take from the line what is due and write it to the receiver, up to the cuts."""
        loop = asyncio.get_running_loop()
        while True:
            piece = await line.pieces.get()
            await _sleep_until(piece.deliver_at)
            await connection.flowing.wait()
            if not piece.data:
                with contextlib.suppress(OSError):  # the receiver may be gone already
                    sink.shutdown(socket.SHUT_WR)
                return
            data = piece.data
            while data:
                taken, cut = lane.admit(len(data))
                async with connection.news():
                    await loop.sock_sendall(sink, data[:taken])
                data = data[taken:]
                if cut is not None:
                    await _drained(sink)
                    self.fire(cut)
                    await connection.flowing.wait()
            line.landed(piece)


async def _sleep_until(when: float) -> None:
    wait = when - asyncio.get_running_loop().time()
    if wait > 0:
        await asyncio.sleep(wait)


async def _drained(sink: socket.socket) -> None:
    """Wait, a second at most, until the kernel has delivered what was written: a reset throws it away."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _DRAIN_S
    while loop.time() < deadline:
        (unsent,) = struct.unpack("i", fcntl.ioctl(sink, termios.TIOCOUTQ, b"\0" * 4))
        if unsent == 0:
            return
        await asyncio.sleep(0.001)


def shrink(end: socket.socket, *, receive: Shape, send: Shape) -> None:
    """Buffers of some milliseconds of the rate: a buffer of megabytes would swallow a block at once."""
    low, high = _BUFFER_BYTES
    for option, shape in ((socket.SO_RCVBUF, receive), (socket.SO_SNDBUF, send)):
        if shape.rate is not None:
            end.setsockopt(socket.SOL_SOCKET, option, int(min(max(shape.rate * _BUFFER_S, low), high)))
