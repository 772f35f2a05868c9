"""The prober: what the link to a broker is like, from a few seconds of traffic that belongs to no run.

    round trips    empty probes, one by one
    up             full probes, empty answers
    down           empty probes, full answers
    both           full probes, full answers: as an exchange is, in which acknowledgements wait behind data
    start          the same after a pause, a few pieces: by how much that is longer than the rates have it

Rates are of payload, as a transfer gets it: pieces like chunks, and no more under way than a transfer's window. What
would flatter is left out of them: the start of each stream (slow start, a shaper's burst), and single slices (medians).
Nothing is known here of what the figures are for.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import math
import secrets
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Literal

import zmq

from parablock import wire
from parablock.messages import MAX_PROBE_BYTES, Probe, Probed, Refused
from parablock.network import EndpointError
from parablock.plan import Link
from parablock.wire import Envelope
from workers.handshakes import Handshake, denied, failed
from workers.socket import DealerSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.socket import Credentials

Way = Literal["up", "down", "both"]

STREAM_S = 2.0
"""How long each direction is measured, about; longer where that is only a few round trips."""

_STREAM_ROUND_TRIPS = 16
_STREAM_BYTES = 256 << 20  # on a link so fast that this ends sooner
_ROUND_TRIPS, _ROUND_TRIPS_S = 12, 1.0
_SMALLEST_PIECE = 4 << 10
_PIECE_S = 0.04
"""A piece takes at least this long, or is as large as it may be: shorter ones would be within a shaper's burst."""
_QUEUE_S = 0.3
"""The window does not grow any more when a piece waits this long behind others: a slow link would be full for long."""
_FEWEST = 12  # pieces in a stream, however slow
_SLICES = 8

PAUSE_S = 1.0
"""Before a start is measured: longer than TCP remembers how much the link took at once."""

_STARTS = 3
_START_S = 0.5  # of traffic after each pause, about; no more than a window
_START_PIECES = 4


class Unanswered(ConnectionError):
    """No broker answers, or it has stopped answering; the text says where, and what to do."""


class Refusal(ValueError):
    """The broker does not take probes; the text says why."""


class Prober:
    """One link. most_piece: `network.chunk_bytes`; window_bytes: of a transfer; patience_s: longest silence.

    credentials: see `DealerSocket`.
    """

    def __init__(
        self,
        endpoint: str,
        most_piece: int,
        window_bytes: int,
        patience_s: float,
        credentials: Credentials | None = None,
    ) -> None:
        """Raises EndpointError where ZeroMQ cannot make anything of `endpoint`."""
        self._endpoint = endpoint
        self._credentials = credentials
        self._handshake = Handshake.DONE
        self._most_piece = min(most_piece, MAX_PROBE_BYTES)
        self._window_bytes = window_bytes
        self._patience_s = patience_s
        self._sequence = 0
        self._sent: dict[int, float] = {}  # when, by sequence; what is not answered yet
        self._answered: deque[tuple[float, float]] = deque()  # (sent, answered)
        self._refusal: str | None = None
        self._changed = asyncio.Event()
        self._ever = False
        self._buffer = memoryview(bytes(self._most_piece))
        try:
            identity = b"probe-" + secrets.token_hex(8).encode()
            self._socket = DealerSocket(
                endpoint, identity, self._on_frames, credentials=credentials, on_handshake=self._on_handshake
            )
        except zmq.ZMQError as error:
            raise EndpointError(f"cannot connect to {endpoint}: {error.strerror}; expected tcp://HOST:PORT") from error

    async def measure(self, told: Callable[[str], None]) -> Link:
        """told: called with what is measured next. Raises Unanswered and Refusal."""
        try:
            told("round-trip time")
            rtt_s = await self._round_trip()
            told("upload")
            up = await self._rate(rtt_s, "up")
            told("download")
            down = await self._rate(rtt_s, "down")
            told("both at once")
            share = min(await self._rate(rtt_s, "both") / min(up, down), 1.0)
            told("starts")
            return await self._started(Link(rtt_s, share * up, share * down))
        finally:
            self._socket.close(linger_ms=0)

    async def _round_trip(self) -> float:
        """Median, in seconds; the first one connects and does not count."""
        await self._one(0, "up")
        began = time.monotonic()
        found: list[float] = []
        while len(found) < 3 or (len(found) < _ROUND_TRIPS and time.monotonic() - began < _ROUND_TRIPS_S):
            found.append(await self._one(0, "up"))
        return statistics.median(found)

    async def _rate(self, rtt_s: float, way: Way) -> float:
        """Payload in bytes per second."""
        piece = await self._piece(rtt_s, way)
        answers, grown, window = await self._stream(piece, rtt_s, way)
        return rate(answers, piece, grown, window)

    async def _piece(self, rtt_s: float, way: Way) -> int:
        """As many bytes as take `_PIECE_S`, about, or as one may have."""
        piece = min(_SMALLEST_PIECE, self._most_piece)
        while await self._one(piece, way) < rtt_s + _PIECE_S and piece < self._most_piece:
            piece = min(2 * piece, self._most_piece)
        return piece

    async def _started(self, link: Link) -> Link:
        """`link` with its start: what pieces that go up and come down at once take longer after a pause, median."""
        piece = await self._piece(link.rtt_s, "both")
        asked = math.ceil(_START_S * min(link.up_bytes_s, link.down_bytes_s) / piece)
        count = min(max(asked, _START_PIECES), max(self._window_bytes // piece, 1))
        slower, faster = sorted((piece / link.up_bytes_s, piece / link.down_bytes_s), reverse=True)
        expected_s = link.rtt_s + count * slower + faster
        found = []
        for _ in range(_STARTS):
            await asyncio.sleep(PAUSE_S)
            began = time.monotonic()
            for _ in range(count):
                self._send(piece, "both")
            left = count
            while left:
                answers = await self._next()
                left -= len(answers)
            found.append(answers[-1][1] - began - expected_s)
        return dataclasses.replace(link, start_s=max(statistics.median(found), 0.0))

    async def _stream(self, piece: int, rtt_s: float, way: Way) -> tuple[list[float], int, int]:
        """Keep the link full of pieces; when each was answered, how many of those came while the window grew, and it.

        The window opens by one piece with each answer, up to a transfer's, until pieces wait for each other.
        """
        ends = time.monotonic() + max(STREAM_S, _STREAM_ROUND_TRIPS * rtt_s)
        answers: list[float] = []
        most = max(_FEWEST, _STREAM_BYTES // piece)
        window, full = 2, max(2, self._window_bytes // piece)
        sent = grown = 0
        while True:
            while len(self._sent) < window and sent < most:
                if sent >= _FEWEST and time.monotonic() >= ends:
                    most = sent
                    break
                self._send(piece, way)
                sent += 1
            if len(answers) == sent:
                return answers, grown, window
            for asked, answered in await self._next():
                answers.append(answered)
                if window < full and answered - asked < rtt_s + _QUEUE_S:
                    window, grown = window + 1, len(answers)

    async def _one(self, nbytes: int, way: Way) -> float:
        """Seconds from a probe to its answer."""
        self._send(nbytes, way)
        ((asked, answered),) = await self._next()
        return answered - asked

    def _send(self, nbytes: int, way: Way) -> None:
        self._sequence += 1
        probe = Probe(self._sequence, nbytes if way != "up" else 0)
        payload = self._buffer[:nbytes] if way != "down" and nbytes else None
        self._sent[self._sequence] = time.monotonic()
        self._socket.send(wire.encode(Envelope("", 0, probe, payload)))

    async def _next(self) -> list[tuple[float, float]]:
        """At least one more (sent, answered). Raises Unanswered after `patience_s` of silence."""
        while not self._answered:
            self._changed.clear()
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._changed.wait()
            except TimeoutError as error:
                raise Unanswered(self._silence()) from error
            if self._refusal is not None:
                raise Refusal(self._refusal)
        found = list(self._answered)
        self._answered.clear()
        return found

    def _silence(self) -> str:
        if self._ever:
            return f"the broker at {self._endpoint} has stopped answering for {self._patience_s:g} s; try again"
        if self._handshake is Handshake.FAILED:
            assert self._credentials is not None
            return failed(self._endpoint, self._credentials)
        return (
            f"no broker answers at {self._endpoint} within {self._patience_s:g} s; start it (parablock broker "
            "CONFIG.toml), or give the link's --rate instead"
        )

    def _on_handshake(self, handshake: Handshake) -> None:
        self._handshake = handshake
        if handshake is Handshake.DENIED:
            assert self._credentials is not None
            self._refusal = denied(self._endpoint, self._credentials)
            self._changed.set()

    def _on_frames(self, frames: list[memoryview]) -> None:
        now = time.monotonic()
        try:
            message = wire.decode(frames).message
        except wire.WireError as error:
            self._refusal = f"what answers at {self._endpoint} is no broker of this version: {error}"
        else:
            if isinstance(message, Probed) and message.sequence in self._sent:
                self._ever = True
                self._answered.append((self._sent.pop(message.sequence), now))
            elif isinstance(message, Refused):
                self._refusal = f"the broker at {self._endpoint} refused: {message.reason}"
        self._changed.set()


def rate(answers: Sequence[float], piece: int, grown: int, window: int) -> float:
    """Bytes per second from the times at which pieces were answered: the median over slices, without the start.

    The start is a quarter of the time, or as long as the window grew: until so many were answered; at most half of the
    pieces. A slice has whole windows of pieces, which may come all at once, once in a round trip.
    """
    assert len(answers) >= _FEWEST, f"{len(answers)} pieces say nothing"
    quarter = bisect.bisect_left(answers, answers[0] + (answers[-1] - answers[0]) / 4)
    steady = answers[min(max(quarter, grown), len(answers) // 2) :]
    gaps = len(steady) - 1
    length = math.ceil(gaps / _SLICES / window) * window  # whole windows, else a slice would have one more than it took
    starts = range(0, gaps - length + 1, length) if length <= gaps else ()
    slices = [(start, start + length) for start in starts] or [(0, gaps)]
    return statistics.median((high - low) * piece / max(steady[high] - steady[low], 1e-9) for low, high in slices)
