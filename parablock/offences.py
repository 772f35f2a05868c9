"""Offences: who has broken the protocol how often, and for how long a client is not let in again.

The first offence bars a client for 10 s, each further one for twice as long, up to an hour. Only a name that the
connection proves can be barred; what comes without one, on an unencrypted connection, is counted and no more, all of
it together, as anybody may choose any name there. For each hour in which a client could commit one and did not, its
count is halved; a client whose key is revoked is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from parablock.tally import Tally

FIRST_BAR_S = 10.0
LONGEST_BAR_S = 3600.0

_TELL_ALL = 10
"""Of those without a proven name so many offences are told; of those after them the 16th, 32nd, 64th ..."""


@dataclass(frozen=True)
class Offence:
    """number: which one of this client. barred_s: it is not let in for so long; 0: it cannot be barred.

    told: whether it is worth a line in the record, of which those without a name could otherwise fill the disk.
    """

    number: int
    barred_s: float
    told: bool


class Offences:
    """Names are clients'. Times in seconds."""

    def __init__(self) -> None:
        self._tally = Tally(_TELL_ALL)  # "" stands for all whose name nothing proves
        self._until: dict[str, float] = {}

    def add(self, name: str, now: float, *, proven: bool) -> Offence:
        """proven: the connection says that it is this client's."""
        number = self._tally.add(name if proven else "", now)
        if not proven:
            return Offence(number, 0.0, self._tally.tells(number))
        barred_s = min(FIRST_BAR_S * 2.0 ** min(number - 1, 16), LONGEST_BAR_S)
        self._until[name] = now + barred_s
        self._tally.wait(name, now + barred_s)
        return Offence(number, barred_s, told=True)

    def forget(self, client: str) -> None:
        """Who comes under this name from now on is another one."""
        self._tally.forget(client)
        self._until.pop(client, None)

    def barred_s(self, client: str | None, now: float) -> float:
        """For how long a client is not let in from now on; 0.0: it is."""
        if client not in self._until:
            return 0.0
        left = self._until[client] - now
        if left <= 0.0:
            del self._until[client]
        return max(left, 0.0)
