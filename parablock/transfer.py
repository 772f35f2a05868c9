"""Transfers: a block's bytes in chunks, from a sender within its credit to a receiver, resumable from what it holds.

One `Outgoing` and one `Incoming` are the two ends of one transfer. Both are passive: they say what may be sent or
what was taken, and read no clock. The receiver grants credit as absolute offsets ("holds `held`, takes up to
`until`"), so a repeated or reordered grant does no harm. Chunks arrive in order on a live connection; after a lost one
the sender goes back to `held` and repeats from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from parablock.wire import Buffer


class TransferError(ValueError):
    """The peer broke the rules of a transfer; the text says how."""


class Outgoing:
    """The sending end. The payload is immutable from here on: views of it are handed to the socket uncopied."""

    def __init__(self, payload: Buffer, chunk_bytes: int, window_bytes: int) -> None:
        self._payload = payload.cast("B")
        self._chunk_bytes = chunk_bytes
        self.nbytes = self._payload.nbytes
        self.sent = 0
        self.held = 0
        self._until = min(window_bytes, self.nbytes)

    @property
    def done(self) -> bool:
        """The receiver has said that it holds everything."""
        return self.held == self.nbytes

    def due(self) -> Iterator[tuple[int, Buffer]]:
        """(offset, view) of each chunk that credit covers and that was not sent yet; counts them as sent.

        Whole chunks only, so that chunk borders are the same whatever the credit was.
        """
        while self.sent < self.nbytes:
            end = min(self.sent + self._chunk_bytes, self.nbytes)
            if end > self._until:
                return
            start, self.sent = self.sent, end
            yield start, self._payload[start:end]

    def credit(self, held: int, until: int) -> bool:
        """Take a grant; true if the receiver holds more than it did. Raises TransferError for an impossible one."""
        if not held <= until <= self.nbytes or (held % self._chunk_bytes and held != self.nbytes):
            raise TransferError(f"credit of {held} held, up to {until}, for a transfer of {self.nbytes} bytes")
        self._until = max(self._until, until)
        if held <= self.held:
            return False
        self.held = held
        self.sent = max(self.sent, held)
        return True

    def rewind(self) -> None:
        """Send again what the receiver has not confirmed: after a loss of contact, or too long without progress."""
        self.sent = self.held


class Incoming:
    """The receiving end. Chunks are kept as they came, uncopied; `pieces` is the whole once `done`."""

    def __init__(self, nbytes: int, chunk_bytes: int, window_bytes: int) -> None:
        self.nbytes = nbytes
        self._chunk_bytes = chunk_bytes
        self._window_bytes = window_bytes
        self.held = 0
        self.pieces: list[Buffer] = []

    @property
    def done(self) -> bool:
        return self.held == self.nbytes

    @property
    def until(self) -> int:
        """The end of the credit."""
        return min(self.held + self._window_bytes, self.nbytes)

    def take(self, offset: int, payload: Buffer) -> bool:
        """Keep the next chunk; false for one that is held already or comes too early (after a loss).

        Raises TransferError for a chunk that cannot be part of this transfer, or that was sent beyond its credit.
        """
        expected = min(self._chunk_bytes, self.nbytes - offset)
        if offset % self._chunk_bytes or payload.nbytes != expected:
            raise TransferError(
                f"a chunk of {payload.nbytes} bytes at {offset}; expected {max(expected, 0)} bytes "
                f"at a multiple of {self._chunk_bytes} below {self.nbytes}"
            )
        if offset + payload.nbytes > self.until:
            raise TransferError(f"a chunk that ends at {offset + payload.nbytes}, beyond the credit of {self.until}")
        if offset != self.held:
            return False
        self.pieces.append(payload)
        self.held += payload.nbytes
        return True
