"""The open rounds at the broker: those that are not committed, by number, and who is to contribute to each.

A round is there from the first that comes of it, or when its turn has come, until it is committed. What comes is in
`parablock.uploads`, what is made of it in `parablock.folding`, and when one closes in `parablock.collection`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.closing import passed
from parablock.rounds import Round

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parablock.agenda import Agenda
    from parablock.config import Config
    from parablock.roster import Roster
    from parablock.sums import Sums


class OpenRounds:
    """next: the first that is not committed. agenda: the rounds up to in_flight beyond that are decided.

    stirred: something has happened since it was looked at last that may begin a fold or close a round. tardy: who was
    not in time for its last round; nobody's chunks wait for those. sums: where contributions are masked.
    """

    def __init__(self, config: Config, agenda: Agenda, roster: Roster, sums: Sums | None) -> None:
        self.next = 0
        self.stirred = False
        self.tardy: set[str] = set()
        self._config = config
        self._agenda = agenda
        self._roster = roster
        self._sums = sums
        self._rounds: dict[int, Round] = {}

    @property
    def complete(self) -> bool:
        """Every round is committed."""
        return self.next == self._config.rounds

    @property
    def farthest(self) -> int:
        """The last round of which anything may come."""
        return min(self.next + self._config.in_flight, self._config.rounds - 1)

    @property
    def at_hand(self) -> Round | None:
        """The one whose turn it is, if anything has come of it."""
        return self._rounds.get(self.next)

    def all(self) -> Iterable[Round]:
        return self._rounds.values()

    def find(self, number: int) -> Round | None:
        """None: nothing has come of it, or it is committed."""
        return self._rounds.get(number)

    def round(self, number: int) -> Round:
        """One that is decided and not committed."""
        if number not in self._rounds:
            self._rounds[number] = Round(number, self._agenda.block(number))
        return self._rounds[number]

    def close(self, number: int) -> None:
        """It is committed."""
        del self._rounds[number]
        self.next = number + 1
        self.stirred = True

    def part_from(self, client: str) -> None:
        """A client's session ends: what it was to give to the open rounds may be on its way, and come to nothing."""
        for number in range(self.next, self.farthest + 1):
            if client in self._roster.members(number) and self._agenda.trains(number, client):
                self.round(number).began.add(client)

    def members(self, round: Round) -> frozenset[str]:
        """Live clients that shall contribute to it."""
        members = self._agenda.members(round.number, self._roster.members(round.number))
        return members if self._sums is None else self._sums.members(round.number, members)

    def out(self, number: int) -> set[str]:
        """Who does not contribute to it."""
        return self._rounds[number].out if number in self._rounds else set()

    def passed(self, round: Round, now: float) -> bool:
        """Whether its deadline has."""
        return passed(round, self._config.round, now)
