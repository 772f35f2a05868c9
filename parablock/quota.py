"""Quotas: how much each client may say. Plain arithmetic on numbers that are given; what is done about one that says
more is `parablock.coordinator`'s business.

A holder of a quota is a client by its name, or a peer by its address where connections have no names. A message costs
a token; tokens come back with time, and for what the broker has sent that is to be answered:

    a chunk that is part of a transfer    nothing: the broker has granted it
    any other chunk, any other message    1
    Hello, Join                           as many as they may have the broker send: a window
    a new block's chunk, to the holder    gives 1: it is answered by a Credit
    a commit, to the holder               gives a window and some: what was on its way to the round comes to nothing
    a probe                               by its bytes, both ways, from a quota of its own

An honest worker stays far below: it says a handful of messages each heartbeat, and greets at most once a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.layout import Layout
from parablock.messages import MAX_PROBE_BYTES, MAX_SLICES, Hello, Join

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import Message

Holder = str | bytes

_GENEROUS = 20
"""Times what an honest worker says by the clock."""

_BURST_S = 10.0
"""So many seconds' worth may come at once."""

_FEW = 8
"""Messages that surround a transfer: Offer, Landed, Evaluated, Waiting, and some that are repeated."""

_A_ROUND = _FEW + 2 + MAX_SLICES
"""Messages of a round: those, and a secure sum's Keys, Shares and an Unmasked for each slice."""

_PROBE_BYTES = 2 << 30
"""May come and go at once in probes; `parablock plan` moves half of that over the fastest link."""

_PROBE_RATE = 16 << 20
"""Bytes a second that come back."""

_PROBE_BYTES_LEAST = 4 << 10
"""What a probe without bytes counts as."""

_MOST_FULL = 1024
"""So many holders are remembered before those that have all their tokens are forgotten: they are as good as new."""


class Bucket:
    """`rate` tokens a second, up to `burst`; begins full. Times in seconds."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = now

    def take(self, tokens: float, now: float) -> bool:
        """False, and nothing is taken, if there are not so many."""
        self._refill(now)
        left = self._level - tokens
        if left < 0:
            return False
        self._level = left
        return True

    def give(self, tokens: float) -> None:
        self._level = min(self._level + tokens, self._burst)

    def full(self, now: float) -> bool:
        self._refill(now)
        return self._level == self._burst

    def _refill(self, now: float) -> None:
        self._level = min(self._level + (now - self._at) * self._rate, self._burst)
        self._at = now


class Quotas:
    """One for control messages and one for probes of each holder. window: messages that one window of credit is."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self.window = max((_window(config, block.numel) for block in manifest.blocks), default=1)
        by_clock = (config.in_flight + 4) / config.network.heartbeat_s
        resent = self.window / config.network.resend_s  # what of a stalled block is sent again is answered again
        self.rate = _GENEROUS * by_clock + 2 * (self.window + _FEW) + resent
        self.burst = _BURST_S * self.rate
        self._said: dict[Holder, Bucket] = {}
        self._probed: dict[Holder, Bucket] = {}

    def spend(self, holder: Holder, message: Message, now: float) -> str | None:
        """Count a message; why it is one too many, or None."""
        tokens = self.window + _FEW if isinstance(message, (Hello, Join)) else 1
        if self._bucket(self._said, holder, self.rate, self.burst, now).take(tokens, now):
            return None
        return f"more than {self.burst:.0f} messages at once, or {self.rate:.0f} a second, that nothing asked for"

    def spend_probe(self, holder: Holder, nbytes: int, now: float) -> str | None:
        """Count a probe of so many bytes, up and down; why it is too many, or None."""
        assert nbytes <= 2 * MAX_PROBE_BYTES
        bucket = self._bucket(self._probed, holder, _PROBE_RATE, _PROBE_BYTES, now)
        if bucket.take(nbytes + _PROBE_BYTES_LEAST, now):
            return None
        return f"more probes than {_PROBE_BYTES >> 30} GiB, or {_PROBE_RATE >> 20} MiB a second; try again later"

    def took_chunk(self, holder: Holder) -> None:
        """The chunk that was counted last is part of a transfer."""
        self._said[holder].give(1)

    def sent_chunk(self, holder: Holder) -> None:
        """A chunk of a block was sent, and is to be answered."""
        if holder in self._said:
            self._said[holder].give(1)

    def sent_commit(self, holder: Holder) -> None:
        """A round was closed, and its holder is told."""
        if holder in self._said:
            self._said[holder].give(self.window + _A_ROUND)

    def _bucket(self, buckets: dict[Holder, Bucket], holder: Holder, rate: float, burst: float, now: float) -> Bucket:
        bucket = buckets.get(holder)
        if bucket is None:
            if len(buckets) >= _MOST_FULL:
                for other in [other for other, each in buckets.items() if each.full(now)]:
                    del buckets[other]
            bucket = buckets[holder] = Bucket(rate, burst, now)
        return bucket


def _window(config: Config, numel: int) -> int:
    """Chunks of a block of `numel` elements that one window holds at most, either way."""
    layouts = Layout.up(config, numel), Layout.down(config, numel, 0), Layout.down(config, numel, 1)
    window = config.network.window_bytes
    return max(min(layout.count, -(-window // layout.chunk_bytes)) for layout in layouts)
