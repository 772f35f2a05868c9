"""A worker's patience with the broker: when it calls, when it says that it is there, when silence is worth a word, and
when it gives up.

While it calls nobody, it waits longer from call to call, up to half a minute, each worker by chance a little less, so
that not all of them call at once a broker that is back; as soon as that is heard, the next call comes as the first.
Told to join again it calls at once, but no sooner than a second after the call before.

Times only, in seconds; what is said then is `parablock.participant`'s business.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parablock.sections import Network

_CALL_S = 1.0
"""To the second call; from each to the next twice as long, but no longer than `_LONGEST_CALL_S`."""

_LONGEST_CALL_S = 30.0

_UNANSWERED_S = 2.0
"""Of calls, before the user hears of it."""

_FAREWELL_S = 1.0
"""From one goodbye to the next, for `_LEAVE_S` altogether."""

_LEAVE_S = 10.0


class Patience:
    """limit_s: silence after which the worker gives up. seed: of the part of each wait that is left to chance.

    silent: the user was told that nothing is heard, and nothing has been since. stopped: the broker has said itself
    that it stops, and another one is to come. resend_s: as the broker's settings say, once they are known.
    """

    def __init__(self, limit_s: float, seed: str, now: float) -> None:
        self.silent = False
        self.stopped = False
        self.resend_s = 5.0
        self._heartbeat_s = 2.0
        self._timeout_s = 30.0
        self._limit_s = limit_s
        self._heard_at = now
        self._said_at = self._called_at = now - 1e9  # the first Tick calls
        self._jitter = random.Random(seed)
        self._calls = 0  # since the broker was last heard
        self._call_after = 0.0  # from the newest call, or whatever was said last, to the next one
        self._leaving_since = now

    def settle(self, network: Network) -> None:
        """The broker's settings are known. They may change when a run is resumed."""
        self._heartbeat_s = network.heartbeat_s
        self._timeout_s = network.timeout_s
        self.resend_s = network.resend_s

    # What happens

    def heard(self, now: float) -> bool:
        """The broker has said something. Returns whether it was silent before."""
        was_silent, self.silent, self.stopped = self.silent, False, False
        self._heard_at = now
        self._calls = 0
        return was_silent

    def said(self, now: float) -> None:
        """Something was said that shows that we are there."""
        self._said_at = now

    def called(self, now: float) -> None:
        """Settle when to call again: exponential backoff, with half of each wait left to chance."""
        self._said_at = self._called_at = now
        longest = min(_CALL_S * 2.0**self._calls, _LONGEST_CALL_S)
        self._call_after = longest * self._jitter.uniform(0.5, 1.0)
        self._calls = min(self._calls + 1, 10)

    def call_anew(self, now: float) -> bool:
        """Whether to call at once. Else the next call is due a second after the last one: one that came twice may have
        ended what it began; answered at once, again and again, it never ends."""
        if now >= self._called_at + _CALL_S:
            return True
        self._said_at, self._call_after = self._called_at, _CALL_S
        return False

    def leaves(self, now: float) -> None:
        """The first goodbye is said."""
        self._said_at = self._leaving_since = now

    def stop(self) -> None:
        """The broker has said that it stops, and that another one will come."""
        self.silent = self.stopped = True

    # What is due

    def ended(self, now: float) -> str | None:
        """Why to give up; None: not yet."""
        lost = now >= self._heard_at + self._limit_s
        return f"nothing heard from the broker for {self._limit_s:g} s" if lost else None

    def fell_silent(self, now: float, *, calling: bool) -> str | None:
        """What to tell the user of a silence that has lasted long enough for that; once."""
        if self.silent or now < self._heard_at + (_UNANSWERED_S if calling else self._timeout_s):
            return None
        self.silent = True
        if calling:
            return "the broker does not answer yet"
        return f"nothing heard from the broker for {now - self._heard_at:.0f} s"

    def call_due(self, now: float) -> bool:
        return now >= self._said_at + self._call_after

    def heartbeat_due(self, now: float) -> bool:
        return now >= self._said_at + self._heartbeat_s

    def farewell_due(self, now: float) -> bool:
        """Whether to say goodbye again, or to go without an answer (`unanswered`)."""
        return now >= self._said_at + _FAREWELL_S

    def unanswered(self, now: float) -> bool:
        """Whether goodbye was said for long enough."""
        return now >= self._leaving_since + _LEAVE_S

    # When that is

    def calls_at(self) -> float:
        """When to look again while we call."""
        due = min(self._said_at + self._call_after, self._heard_at + self._limit_s)
        return due if self.silent else min(due, self._heard_at + _UNANSWERED_S)

    def beats_at(self) -> float:
        """The same in a session."""
        return min(self._said_at + self._heartbeat_s, self._heard_at + self._limit_s)

    def leaves_at(self) -> float:
        """The same while we say goodbye."""
        return self._said_at + _FAREWELL_S
