"""The ledger: in how many rounds each client's data have had a part, and what that has cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from parablock.accountant import epsilon
from parablock.saved import EVERYBODY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from parablock.privacy_settings import Privacy


class Ledger:
    """Raises NoAccountantError where something is asked for that cannot be worked out."""

    def __init__(self, privacy: Privacy) -> None:
        self._privacy = privacy
        self._next = 0  # the round that is expected next
        self.rounds: Counter[str] = Counter()  # by client
        self.untold = 0  # rounds of which nothing tells whose data have had a part in them

    def take(self, round: int, charged: Iterable[str]) -> None:
        """A round is committed to which these have given of their data, each once (`Entry.charged`).

        Rounds between it and the one before it were held too, and nothing tells of them any more, as the journal was
        made anew: each is charged to every client.
        """
        self.untold += max(round - self._next, 0)
        self._next = round + 1
        names = set(charged)
        if EVERYBODY in names:
            self.untold += 1
        else:
            self.rounds.update(names)

    @property
    def most(self) -> int:
        """Rounds of the client that has had a part in the most."""
        return max(self.rounds.values(), default=0) + self.untold

    @property
    def epsilon(self) -> float | None:
        """What that client's have cost, at `privacy.delta`; None where nobody is protected."""
        return epsilon(self._privacy.noise, self.most, self._privacy.delta) if self._privacy.private else None
