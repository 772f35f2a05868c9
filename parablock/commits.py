"""Which rounds a worker knows to be committed, and which of their blocks it has in hand. Bookkeeping, no messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parablock.messages import Start

_UNKNOWN = 2**31 + 1
"""Above every round: before the Start, whatever comes is taken for a pending one."""


class Commits:
    """Which commits have been told and which blocks have arrived, since the last greeting.

    Rounds before `next` were committed before our Start; of those only the `pending` ones come, because we held older
    versions of their blocks. From `next` on every round comes, and `frontier` is the first that is not in hand.
    """

    def __init__(self, told: int) -> None:
        self.told = told  # the first round that is not known to be committed
        self.greeted_at = told  # what `told` was when we greeted
        self._next = _UNKNOWN
        self._frontier = self._next
        self._early: set[int] = set()  # in hand, beyond the frontier
        self._synced: set[int] = set()  # in hand, from before the Start
        self._pending: frozenset[int] = frozenset()

    def start(self, start: Start) -> None:
        """The broker has said where we begin. What came before, out of order, finds its place."""
        self._next = self._frontier = start.next
        self._pending = frozenset(start.pending)
        self.told = max(self.told, start.next)
        early = {round for round in self._synced if round >= start.next}  # overtook the start
        self._synced -= early
        for round in early:
            self.arrive(round)

    def wanted(self, round: int) -> bool:
        """Whether the broker owes us the block that `round` made; before the Start nobody can say."""
        return round >= self._next or round in self._pending or self._next == _UNKNOWN

    def arrive(self, round: int) -> None:
        """The block that `round` made is in hand, or need not come."""
        if round < self._next:
            self._synced.add(round)
            return
        self._early.add(round)
        while self._frontier in self._early:
            self._early.remove(self._frontier)
            self._frontier += 1

    def has(self, round: int) -> bool:
        """Whether `round` has arrived since the last greeting."""
        return round in self._synced or round in self._early or self._next <= round < self._frontier

    def through(self, round: int) -> bool:
        """Whether every block committed in or before `round` is in hand."""
        return self._next != _UNKNOWN and self._pending <= self._synced and round < self._frontier
