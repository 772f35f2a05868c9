"""Offences: who has broken the protocol how often, and for how long a client is not let in again.

The first offence bars a client for 10 s, each further one for twice as long, up to an hour. Only a name that the
connection proves can be barred; what comes without one, on an unencrypted connection, is counted and no more. Counts
last as long as the broker's process.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

FIRST_BAR_S = 10.0
LONGEST_BAR_S = 3600.0

_TELL_ALL = 10
"""Of strangers so many offences are told; of those after them the 16th, 32nd, 64th ..."""


@dataclass(frozen=True)
class Offence:
    """number: which one of this client. barred_s: it is not let in for so long; 0: it cannot be barred.

    told: whether it is worth a line in the record, of which strangers could otherwise fill the disk.
    """

    number: int
    barred_s: float
    told: bool


class Offences:
    """Names are clients'; "" stands for all strangers together. Times in seconds."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._until: dict[str, float] = {}

    def add(self, name: str, now: float, *, proven: bool) -> Offence:
        """proven: the connection says that it is this client's."""
        self._counts[name] += 1
        number = self._counts[name]
        told = bool(name) or number <= _TELL_ALL or math.log2(number).is_integer()
        if not proven:
            return Offence(number, 0.0, told)
        barred_s = min(FIRST_BAR_S * 2.0 ** min(number - 1, 16), LONGEST_BAR_S)
        self._until[name] = now + barred_s
        return Offence(number, barred_s, told)

    def barred_s(self, client: str | None, now: float) -> float:
        """For how long a client is not let in from now on; 0.0: it is."""
        if client not in self._until:
            return 0.0
        left = self._until[client] - now
        if left <= 0.0:
            del self._until[client]
        return max(left, 0.0)
