"""Late contributions: what clients made for a round that was closed without it, and may count in a later one.

    owed ──offered, or on its way at the close──▸ held ──complete at the next close of its block──▸ counted
      │                                            │
      └──its block was closed VISITS times more    └──not complete by then, unfit, its process is gone──▸ dropped

Who is owed is settled by the close of a round: those who were waited for and are not in it. From there each step is
taken once, so that nothing counts twice, in its own round and later, or after any number of resends. Of each client one
is held at a time, which is the most that late ones cost in memory: a block a client; a client that is late each time
has its blocks counted in turn (`has_part`). A broker that begins anew holds none and owes nothing, but knows what has
counted. With `round.late = "discard"` nothing is held, and a late offer is only counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from parablock.rounds import Upload

VISITS = 4
"""Closed rounds of one block, counted back from the newest one, to which something may still come late; and how many
late ones of a client that have counted are remembered."""


@dataclass
class Late:
    """One that is held. missed: rounds of its block that were closed without it, its own among them."""

    client: str
    upload: Upload
    missed: int

    @property
    def round(self) -> int:
        """The one that it was made for."""
        return self.upload.offer.round

    @property
    def block(self) -> int:
        return self.upload.offer.block

    @property
    def label(self) -> str:
        """Tells it from what its client makes in time, where the parts of a mean are named."""
        return f"{self.client}@{self.round}"


class LateContributions:
    """Who is owed, what is held, and what has counted of each client."""

    def __init__(self) -> None:
        self._visits: dict[int, deque[tuple[int, set[str]]]] = {}  # by block: closed rounds, and who is owed
        self._held: dict[str, Late] = {}  # by client
        self._counted: dict[str, deque[tuple[int, int]]] = {}  # by client: rounds it was made for and has counted in

    def restore(self, counted: Mapping[str, tuple[int, int]]) -> None:
        """Go on with what is known of the broker before: by client, the newest that counted, and in which round."""
        for client, (made_for, into) in counted.items():
            self._remember(client, made_for, into)

    def counted_in(self, client: str, round: int) -> int | None:
        """In which later round the client's contribution to `round` has counted, as far as is known."""
        return next((into for made_for, into in self._counted.get(client, ()) if made_for == round), None)

    def has_part(self, client: str, round: int) -> bool:
        """Whether something late of the client has counted in `round`, as far as is known."""
        return any(into == round for _, into in self._counted.get(client, ()))

    def held(self, client: str) -> Late | None:
        return self._held.get(client)

    def ready(self, block: int) -> tuple[Late, ...]:
        """What is complete of this block, in the order of the roster."""
        held = (self._held[client] for client in sorted(self._held))
        return tuple(late for late in held if late.block == block and late.upload.incoming.done)

    def claim(self, client: str, block: int, round: int) -> int | None:
        """Take note that what was owed has come. How many rounds of its block it has missed; None: it is not owed."""
        visits = self._visits.get(block, ())
        for age, (number, owed) in enumerate(reversed(visits), start=1):
            if number == round and client in owed:
                owed.remove(client)
                return age
        return None

    def hold(self, client: str, upload: Upload, missed: int) -> Late:
        """One that was claimed, where none is held of this client."""
        assert client not in self._held
        late = self._held[client] = Late(client, upload, missed)
        return late

    def drop(self, late: Late) -> None:
        del self._held[late.client]

    def count(self, late: Late, into: int) -> None:
        """It is part of a round that is committed."""
        self.drop(late)
        self._remember(late.client, late.round, into)

    def _remember(self, client: str, made_for: int, into: int) -> None:
        self._counted.setdefault(client, deque(maxlen=VISITS)).append((made_for, into))

    def close(self, round: int, block: int, owed: AbstractSet[str], *, empty: bool) -> list[Late]:
        """A round is closed, and those that counted in it are let go; returns those that had to be dropped.

        empty: nobody was counted, so that what is complete is still to come.
        """
        dropped = []
        for late in [late for late in self._held.values() if late.block == block]:
            if empty and late.upload.incoming.done:
                late.missed += 1
            else:
                self.drop(late)
                dropped.append(late)
        self._visits.setdefault(block, deque(maxlen=VISITS)).append((round, set(owed)))
        return dropped
