"""Transfers: a block's bytes in chunks, from a sender within its credit to a receiver, resumable from what it holds.

A `Payload` is what is sent: encoded chunks, in order, which may still be in the making while the first ones are on
their way; many transfers may share one. `Outgoing` and `Incoming` are the two ends of one transfer. Both are passive:
they say what may be sent or what was taken, and read no clock. The receiver grants credit as absolute offsets ("holds
`held`, takes up to `until`"), so a repeated or reordered grant does no harm. Chunks arrive in order on a live
connection; after a lost one the sender goes back to `held` and repeats from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from parablock.wire import checksum

if TYPE_CHECKING:
    from parablock.layout import Layout
    from parablock.wire import Buffer


_TELL_EVERY_S = 1.0
_WINDOWS_BEYOND = 4
"""So many windows may come of one transfer that were not granted, before it is no accident."""


class TransferError(ValueError):
    """The peer broke the rules of a transfer; the text says how."""


@dataclass(frozen=True)
class Encoded:
    """The bytes of one chunk, immutable from here on: they are handed to the socket uncopied."""

    payload: Buffer

    @classmethod
    def checked(cls, payload: Buffer) -> Encoded:
        """With its checksum computed here and now, and not where it is sent, on the event loop."""
        chunk = cls(payload)
        _ = chunk.checksum
        return chunk

    @cached_property
    def checksum(self) -> int:
        return checksum(self.payload)


class Payload:
    """`nbytes` in chunks of `chunk_bytes` (the last one shorter), of which some are ready."""

    def __init__(self, nbytes: int, chunk_bytes: int) -> None:
        self.nbytes = nbytes
        self.chunk_bytes = chunk_bytes
        self.chunks: list[Encoded] = []

    @classmethod
    def of(cls, layout: Layout) -> Payload:
        """Nothing yet, of a block laid out like this."""
        return cls(layout.nbytes, layout.chunk_bytes)

    @classmethod
    def whole(cls, values: Buffer, chunk_bytes: int) -> Payload:
        """All of it: views of `values`."""
        payload = cls(values.nbytes, chunk_bytes)
        values = values.cast("B")
        payload.chunks = [Encoded(values[at : at + chunk_bytes]) for at in range(0, values.nbytes, chunk_bytes)]
        return payload

    @property
    def complete(self) -> bool:
        return len(self.chunks) * self.chunk_bytes >= self.nbytes

    def append(self, chunk: Encoded) -> None:
        """The next chunk is ready. Its length must fit: that is our own doing."""
        expected = min(self.chunk_bytes, self.nbytes - len(self.chunks) * self.chunk_bytes)
        assert chunk.payload.nbytes == expected, f"a chunk of {chunk.payload.nbytes} bytes, {expected} expected"
        self.chunks.append(chunk)


class Outgoing:
    """The sending end."""

    def __init__(self, payload: Payload, window_bytes: int) -> None:
        self._payload = payload
        self.nbytes = payload.nbytes
        self.sent = 0
        self.held = 0
        self._until = min(window_bytes, self.nbytes)
        self._newest = 0, self._until  # the grant that came last, which may have been overtaken, or be of before

    @property
    def done(self) -> bool:
        """The receiver has said that it holds everything."""
        return self.held == self.nbytes

    @property
    def under_way(self) -> int:
        """Bytes that were sent and are not confirmed."""
        return self.sent - self.held

    def due(self, room: float = math.inf) -> list[tuple[int, Encoded]]:
        """(offset, chunk) of what is ready, within the credit and not sent yet; counts it as sent.

        room: at most so many bytes. Whole chunks only, so that chunk borders are the same whatever the credit was.
        """
        due: list[tuple[int, Encoded]] = []
        size, chunks = self._payload.chunk_bytes, self._payload.chunks
        while self.sent < self.nbytes:
            index, end = self.sent // size, min(self.sent + size, self.nbytes)
            if end > self._until or end - self.sent > room or index >= len(chunks):
                break
            due.append((self.sent, chunks[index]))
            room -= end - self.sent
            self.sent = end
        return due

    def credit(self, held: int, until: int) -> bool:
        """Take a grant; true if the receiver holds more than it did. Raises TransferError for an impossible one."""
        if not 0 <= held <= until <= self.nbytes or (held % self._payload.chunk_bytes and held != self.nbytes):
            raise TransferError(f"credit of {held} held, up to {until}, for a transfer of {self.nbytes} bytes")
        if held > min(len(self._payload.chunks) * self._payload.chunk_bytes, self.nbytes):
            raise TransferError(f"credit of {held} held, of which not all was made yet")
        self._until = max(self._until, until)
        self._newest = held, until
        if held <= self.held:
            return False
        self.held = held
        self.sent = max(self.sent, held)
        return True

    def settle(self) -> None:
        """The receiver has all of it from elsewhere."""
        self.held = self.sent = self.nbytes

    def rewind(self) -> None:
        """Send again what the receiver has not confirmed: after a loss of contact, or too long without progress.

        The grant that came last is believed now, though it is lower than one before: that one may have been delayed,
        and of a transfer that an earlier session began and the receiver let go of. If it is the lower one that was
        delayed, the receiver says so at the first chunk that it holds already. What it holds all of it keeps.
        """
        if not self.done:
            held, self._until = self._newest
            self.held = min(self.held, held)
        self.sent = self.held


class Incoming:
    """The receiving end. It counts and checks; the bytes are the caller's.

    paused: takes the first window, which needs no grant, and no more for now.
    """

    def __init__(self, nbytes: int, chunk_bytes: int, window_bytes: int, *, paused: bool = False) -> None:
        self.nbytes = nbytes
        self.paused = paused
        self.held = 0
        self._chunk_bytes = chunk_bytes
        self._window_bytes = window_bytes
        self._told = 0  # what `held` was in the newest grant
        self._told_at = 0.0
        self._beyond = 0  # bytes that came beyond the credit, and were not taken

    @property
    def done(self) -> bool:
        return self.held == self.nbytes

    @property
    def until(self) -> int:
        """The end of the credit."""
        return min((0 if self.paused else self.held) + self._window_bytes, self.nbytes)

    def owes_grant(self, now: float) -> bool:
        """Whether the sender should hear of what came at `now`.

        That is: everything, or a quarter of the window since it last heard, or anything if it heard nothing for a
        second, so that it sees progress over a slow link as well, or all that it may send while this is paused, since
        nothing else comes to say so, and what it takes to be under way keeps its other transfers waiting.
        """
        fresh = self.held - self._told
        full = self.paused and self.until - self.held < self._chunk_bytes
        return self.done or full or fresh >= self._window_bytes // 4 or now - self._told_at >= _TELL_EVERY_S

    def grant(self, now: float) -> tuple[int, int]:
        """(held, until), to be told to the sender at `now`, in seconds."""
        self._told, self._told_at = self.held, now
        return self.held, max(self.held, self.until)

    def take(self, offset: int, payload: Buffer) -> bool:
        """Count the next chunk; false for one that is held already, comes too early (after a loss), or was sent beyond
        the credit, as happens where a grant of an earlier session was delayed.

        Raises TransferError for a chunk that cannot be part of this transfer, and for too many beyond the credit.
        """
        expected = min(self._chunk_bytes, self.nbytes - offset)
        if offset % self._chunk_bytes or payload.nbytes != expected:
            raise TransferError(
                f"a chunk of {payload.nbytes} bytes at {offset}; expected {max(expected, 0)} bytes "
                f"at a multiple of {self._chunk_bytes} below {self.nbytes}"
            )
        if offset + payload.nbytes > self.until:
            self._beyond += payload.nbytes
            if self._beyond > _WINDOWS_BEYOND * self._window_bytes:
                raise TransferError(
                    f"{self._beyond} bytes beyond the credit, the last of them up to {offset + payload.nbytes}, "
                    f"granted are {self.until}"
                )
            return False
        if offset != self.held:
            return False
        self.held += payload.nbytes
        return True
