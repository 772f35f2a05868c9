"""A tally: how often something has come from each client of late, and which of it is worth a line in the record.

The first ones are told, and of those after them the 2nd, 4th, 8th ... power of two, so that nobody fills the disk. For
each hour in which nothing came the count is halved.
"""

from __future__ import annotations

_HALVED_AFTER_S = 3600.0


class Tally:
    """tell_all: so many are told one by one. Times in seconds."""

    def __init__(self, tell_all: int) -> None:
        self.tell_all = tell_all
        self._counts: dict[str, tuple[int, float]] = {}  # and since when no hour has passed

    def add(self, name: str, now: float) -> int:
        """Which one of this client it is."""
        count, since = self._counts.get(name, (0, now))
        halvings = int(max(now - since, 0.0) // _HALVED_AFTER_S)
        number = (count >> halvings) + 1
        self._counts[name] = number, now
        return number

    def wait(self, name: str, until: float) -> None:
        """The hours begin then: before, nothing could come."""
        self._counts[name] = self._counts[name][0], until

    def forget(self, name: str) -> None:
        self._counts.pop(name, None)

    def tells(self, number: int) -> bool:
        return number <= self.tell_all or number & (number - 1) == 0
