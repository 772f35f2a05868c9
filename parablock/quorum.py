"""The quorum over time: whether enough clients are there, for how long they have not been, and what is done about it.

    there ──fewer than the quorum──▸ missing ──quorum_lost_s have passed──▸ given up (not where quorum_lost = "wait")
      ▴                                 │                                       │
      └────────────── enough are there again ◂──────────────────────────────────┘

Where a broker was restarted nobody is missed before those who took part have had the time to come back: it may have
begun again because the quorum had been missing. Each change is told once, and ever fewer of them where one client comes
and goes all day. What a round makes of it is `parablock.rounds.decide`'s business.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parablock.tally import Tally

if TYPE_CHECKING:
    from parablock.sections import Rounds


_TELL_ALL = 100
"""Changes that are told one by one."""


class Quorum:
    """policy: `quorum_lost` and `quorum_lost_s` of it. size: fewest clients that must be there. told: whether the
    newest change is worth a line in the record."""

    def __init__(self, policy: Rounds, size: int) -> None:
        self.size = size
        self.given_up = False
        self.told = True
        self._policy = policy
        self._changes = Tally(_TELL_ALL)
        self._since = math.inf  # when it was found missing
        self._until = -math.inf  # before this moment a missing quorum is not said
        self._early = False  # fewer than the quorum are there, and it is before that moment

    def expect(self, until: float) -> None:
        """Clients are coming back, and nobody is missed before `until`, in seconds."""
        self._until = until

    @property
    def due(self) -> float:
        """When it will be missed, or given up, in seconds; never (infinity) where it is there, is waited for, or was
        given up."""
        if self._early:
            return self._until
        if self.given_up or self._policy.quorum_lost == "wait":
            return math.inf
        return self._since + self._policy.quorum_lost_s

    def look(self, there: int, now: float) -> str | None:
        """So many clients are there at `now`; a sentence where that changes something."""
        changed = self._change(there, now)
        if changed is not None:
            self.told = self._changes.tells(self._changes.add("", now))
        return changed

    def _change(self, there: int, now: float) -> str | None:
        policy = self._policy
        self._early = there < self.size and now < self._until
        if self._early:
            return None
        if there >= self.size:
            was_missing, self._since, self.given_up = not math.isinf(self._since), math.inf, False
            return f"{there} clients are there again, at least {self.size} are needed" if was_missing else None
        lacking = f"{there} of at least {self.size} clients are there"
        if math.isinf(self._since):
            self._since = now
            then = {"fewer": "rounds close with those that are there", "stop": "the run stops"}
            after = f"; in {policy.quorum_lost_s:g} s {then[policy.quorum_lost]}" if policy.quorum_lost in then else ""
            if policy.quorum_lost_s or not after:
                return f"{lacking}; rounds wait{after}"
        if now < self.due or self.given_up:
            return None
        self.given_up = True
        done = {"fewer": "rounds close with those that are there from now on", "stop": "the run stops"}
        return f"{lacking}, for {policy.quorum_lost_s:g} s; {done[policy.quorum_lost]} (round.quorum_lost)"
