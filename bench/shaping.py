"""One direction of a shaped link as arithmetic: when bytes that arrive now have left, and where the cuts lie.

Nothing here reads a clock or a socket: `now` is an argument, so that a test moves time by hand. `bench.link`
performs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

BURST_S = 0.020
"""A link that was idle, or whose clock woke late, may catch up by this much of its rate and no more."""

QUANTUM_S = 0.020
"""Bytes are passed on in pieces of about this long: short, so that a slow link trickles rather than lurches, but each
piece costs the cores that train some 0.1 ms."""

_QUANTUM_BYTES = (256, 256 << 10)
_NOMINAL_RATE = 1e9  # bytes/s that an unshaped direction is assumed to reach when its delay line is sized


@dataclass(frozen=True)
class Shape:
    """One direction: `rate` in bytes per second (None: as fast as it goes), `delay_s` added to every byte."""

    rate: float | None = None
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"a link's rate must be above zero bytes per second, got {self.rate!r}")
        if self.delay_s < 0:
            raise ValueError(f"a link's delay must not be negative, got {self.delay_s!r} s")


@dataclass(frozen=True)
class Cut:
    """A fault of the link, at a byte count of one direction or at a time, both counted from the link's start.

    reset: both ends of every open connection get a RST. stall: open connections stay open and carry nothing,
    and neither end learns when the other one closes (half-open); new connections go through.
    """

    kind: Literal["reset", "stall"]
    after_bytes: int | None = None
    after_s: float | None = None
    direction: Literal["up", "down"] = "up"

    def __post_init__(self) -> None:
        if (self.after_bytes is None) == (self.after_s is None):
            raise ValueError("a cut happens after a byte count or after a time; give exactly one of the two")


class TokenBucket:
    """Departures at `rate` bytes per second with at most `burst` bytes at once after idleness."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst_s = burst / rate
        self._free_at = now

    def depart(self, nbytes: int, now: float) -> float:
        """The time at which the last of `nbytes` that arrive now has left; never before `now`."""
        self._free_at = max(self._free_at, now - self._burst_s) + nbytes / self._rate
        return max(self._free_at, now)


class Lane:
    """One direction of a link: its bucket, its delay, where its cuts lie, and what it has carried."""

    def __init__(self, shape: Shape, cuts: Iterable[Cut], now: float) -> None:
        rate = shape.rate or _NOMINAL_RATE
        low, high = _QUANTUM_BYTES
        self.quantum = int(min(max(rate * QUANTUM_S, low), high))
        """Most bytes to take from the sender at once."""
        self.capacity = int(rate * (shape.delay_s + (BURST_S if shape.rate else 0.0))) + self.quantum
        """Bytes that may be on the way before the sender is held back: the delay's worth at full rate, and a
        little more, so that a clock that wakes late does not cost throughput."""
        self.delay_s = shape.delay_s
        self.delivered = 0
        """Bytes admitted to the receiver."""
        self._bucket = TokenBucket(shape.rate, shape.rate * BURST_S, now) if shape.rate else None
        counted = (cut for cut in cuts if cut.after_bytes is not None)
        self._cuts = sorted(counted, key=lambda cut: cut.after_bytes or 0)

    def admit(self, nbytes: int) -> tuple[int, Cut | None]:
        """How many of `nbytes` to be delivered lie before the next cut (mostly all), and the cut they end at.

        Counted where bytes come out: what was on the way when a connection was reset never arrived anywhere.
        """
        if not self._cuts:
            self.delivered += nbytes
            return nbytes, None
        limit = self._cuts[0].after_bytes
        assert limit is not None
        taken = max(0, min(nbytes, limit - self.delivered))
        self.delivered += taken
        return taken, self._cuts.pop(0) if self.delivered >= limit else None

    def depart(self, nbytes: int, now: float) -> float:
        """The time at which the sender's side is free of these bytes; they arrive `delay_s` later."""
        return now if self._bucket is None else self._bucket.depart(nbytes, now)
