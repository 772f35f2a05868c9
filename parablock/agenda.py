"""The agenda: which block a round trains and which clients do, known in_flight + 1 rounds ahead.

A client may train round r when it holds what the rounds up to r − in_flight − 1 have made. So the broker decides r no
later than with the commit of that one, and says it with the same message: whoever may train r knows all about it, and
nobody waits for an announcement. The first in_flight + 1 rounds, and for a newcomer those that are decided already, are
said with the start. Where all of it follows from the settings nothing is said: each side works it out.

Whoever has been drawn for as many rounds as `privacy.rounds` allows is drawn no more, whether or not it came to them.

`Agenda` is the broker's side, `Turns` a client's.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parablock.importance import ImportanceOrder
from parablock.learning_rate import learning_rate
from parablock.saved import EVERYBODY
from parablock.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from parablock.config import Config


@dataclass(frozen=True)
class Turn:
    """What a round is for one client. trains: or else it only takes over the block that the others make."""

    block: int
    trains: bool


@dataclass
class _Decided:
    """clients: those drawn to train the round; None: all that take part. wanted: how many shall be there of those."""

    block: int
    clients: set[str] | None
    wanted: int


class Agenda:
    """What the broker has decided. Rounds are decided one after the other, with what is known at that moment."""

    def __init__(self, config: Config, num_blocks: int) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._schedule = Schedule.of(config, num_blocks)
        self._importance = ImportanceOrder(num_blocks, config.in_flight)  # asked where there is no schedule
        self._everyone = config.mode != "fedcybgd" and config.round.fraction == 1.0
        self._decided: dict[int, _Decided] = {}  # by round
        self._next = 0  # the first that is not decided
        self._begins = 0  # the first that was not held before the broker began
        self._told = 0  # the first of which the journal does not tell who was drawn
        self._turns: dict[str, int] = {}  # by client: rounds for which it was drawn, or has given to
        self._untold = 0  # rounds to which one that is not named there may have given
        self._short: list[str] = []  # what is to be said of rounds for which too few could be drawn

    def decide(self, through: int, clients: Iterable[str]) -> None:
        """Decide all rounds up to `through`. clients: names of those that are there."""
        there = sorted(clients)
        while self._next <= min(through, self._config.rounds - 1):
            round = self._next
            block = self._importance.next() if self._schedule is None else self._schedule.block(round)
            drawn = None if self._everyone else self._draw(round, there)
            self._take_turns(drawn or ())
            self._decided[round] = _Decided(block, drawn, max(len(drawn or ()), self._config.quorum))
            self._decided.pop(round - 2 * self._config.in_flight - 2, None)
            self._next += 1

    def take_short(self) -> list[str]:
        """A sentence for each round decided since the last call that too few can train, as the others have had their
        turns: most of what is left of a run may be trained by few, or by nobody."""
        said, self._short = self._short, []
        return said

    def moved(self, round: int, block: int, rms: float) -> None:
        """A round was committed. rms: the root mean square of x' − x over the elements of the block."""
        if self._schedule is None:
            self._importance.moved(block, rms / learning_rate(self._config.solver, round, self._config.rounds))

    def join(self, client: str, round: int, others: Iterable[str]) -> None:
        """A client begins with `round`: it makes up for who was drawn for the decided rounds from there on and is gone,
        or could not be drawn because fewer than the quorum were there.

        others: names of those that are there.

        It is said to the client at once, and stands in the journal with the next commit. If the broker dies before,
        the next one decides anew, and may leave out whom this one had asked, as who was gone is expected back. Nobody
        is harmed by that: what follows from the settings is as it was; no block is trained in another round, and
        nobody waits for one who is not drawn. What the client has made in vain is refused, and it has had its turn
        (`gave`). Where it is not back before the round is closed, nothing tells of that turn but what it keeps itself.
        """
        there = set(others)
        for number in range(round, self._next):
            drawn, wanted = self._decided[number].clients, self._decided[number].wanted
            if drawn is not None and client not in drawn and len(drawn & there) < wanted and self._may(client):
                drawn.add(client)
                self._take_turns((client,))

    def gave(self, round: int, clients: Iterable[str]) -> None:
        """These have given to a round that is decided, or may have (`Entry.charged`): whoever was not drawn for it, as
        an earlier broker had drawn others, has had a turn all the same."""
        drawn = self._decided[round].clients
        if drawn is not None:
            named = set(clients)
            everybody = EVERYBODY in named
            self._take_turns((self._turns.keys() if everybody else named) - drawn)
            self._untold += everybody

    def block(self, round: int) -> int:
        """Of a round that is decided, and not long gone."""
        return self._decided[round].block

    def find(self, round: int) -> int | None:
        """The same of any number, as a client names it; None: no round, one that is not decided yet, or long gone."""
        if self._schedule is not None:
            return self._schedule.block(round) if 0 <= round < self._next else None
        return self._decided[round].block if round in self._decided else None

    def trains(self, round: int, client: str) -> bool:
        """Whether the client was drawn for a round that is decided."""
        drawn = self._decided[round].clients
        return drawn is None or client in drawn

    def asked(self, round: int) -> frozenset[str] | None:
        """Whom the journal says that a broker before had drawn for a round; None: it does not say, or all were."""
        drawn = self._decided[round].clients
        return frozenset(drawn) if drawn is not None and round < self._told else None

    def members(self, round: int, clients: frozenset[str]) -> frozenset[str]:
        """Those of `clients` that were drawn for a round that is decided."""
        drawn = self._decided[round].clients
        return clients if drawn is None else clients & drawn

    def turns(self, first: int, client: str) -> tuple[Turn, ...]:
        """What is to be said to a client of the decided rounds from `first` on; nothing where the settings say it."""
        if not self._config.announced:
            return ()
        return tuple(Turn(self.block(round), self.trains(round, client)) for round in range(first, self._next))

    def snapshot(self) -> dict[str, Any]:
        """All that is decided and what decides the rest, as JSON has it. What is drawn is drawn from seed and round."""
        decided = [
            {"round": round, "block": each.block, "clients": _sorted(each.clients), "wanted": each.wanted}
            for round, each in self._decided.items()
        ]
        importance = self._importance.snapshot() if self._schedule is None else None
        turns = dict(sorted(self._turns.items()))
        return {"next": self._next, "decided": decided, "importance": importance, "turns": turns}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on as the one of which this is the snapshot, with the same settings and blocks."""
        self._next = self._told = snapshot["next"]
        self._turns = dict(snapshot.get("turns", {}))  # younger than some runs
        for each in snapshot["decided"]:
            clients = None if each["clients"] is None else set(each["clients"])
            self._decided[each["round"]] = _Decided(each["block"], clients, each["wanted"])
        if self._schedule is None:
            self._importance.restore(snapshot["importance"])

    def account(self, next_round: int, charged: Mapping[str, int], untold: int) -> None:
        """After `restore`: who may have given to rounds for which the snapshot does not say that it was drawn, as rows
        are lost that would, has had its turns. Of rounds before next_round nobody is drawn any more.

        charged, untold: as in `parablock.saved.Saved`.
        """
        self._begins, self._untold = next_round, untold
        ahead = Counter(
            client for round, each in self._decided.items() for client in each.clients or () if round >= next_round
        )
        for client in self._turns.keys() | charged.keys() | ahead.keys():
            given = charged.get(client, 0) + untold + ahead[client]
            self._turns[client] = max(self._turns.get(client, 0), given)

    def _draw(self, round: int, present: list[str]) -> set[str]:
        if round < self._begins:
            return set()
        there = [client for client in present if self._may(client)]
        wanted = min(self._config.sampled(self._config.round.clients), len(present))
        if len(there) < wanted:
            self._short.append(
                f"round {round} is trained by {len(there)} clients, and {wanted} are wanted: of the {len(present)} "
                f"that are there the others have had their {self._config.privacy.rounds} rounds (privacy.rounds)"
            )
        if self._config.mode == "fedcybgd":
            return {there[in_turn(round, len(there), self._num_blocks)]} if there else set()
        rng = random.Random(f"parablock/clients/{self._config.seed}/{round}")
        return set(rng.sample(there, self._config.sampled(len(there))))

    def _may(self, client: str) -> bool:
        most = self._config.privacy.rounds
        return not most or self._had(client) < most

    def _had(self, client: str) -> int:
        return self._turns.get(client, self._untold)

    def _take_turns(self, clients: Iterable[str]) -> None:
        self._turns.update({client: self._had(client) + 1 for client in clients})


def _sorted(clients: set[str] | None) -> list[str] | None:
    return None if clients is None else sorted(clients)


def in_turn(round: int, clients: int, num_blocks: int) -> int:
    """The place in the roster of the one client that trains a round, where clients take blocks in a cycle.

    FedCyBGD (Wang et al., arXiv 2406.11187): in round t client t mod N trains block t mod B. By itself that repeats
    after L = lcm(N, B) rounds, and pairs a client only with blocks that are congruent to it modulo g = gcd(N, B). So
    each L rounds begin one client further on: client (t + ⌊t / L⌋) mod N. In g times L, that is N·B rounds, each client
    then trains each block exactly once, also where N and B share a factor; likewise where blocks come last to first.
    """
    return (round + round // math.lcm(clients, num_blocks)) % clients


class Turns:
    """What a client knows of the rounds that it may come to: from the settings, or as the broker has said it."""

    def __init__(self, config: Config, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._in_flight = config.in_flight
        self._schedule = None if config.announced else Schedule.of(config, num_blocks)
        self._said: dict[int, Turn] = {}  # by round

    def hear(self, first: int, blocks: Sequence[int], trains: Sequence[bool]) -> None:
        """The broker has said it of so many rounds from `first` on. Raises ValueError for what cannot be."""
        if len(blocks) != len(trains) or any(block >= self._num_blocks for block in blocks):
            raise ValueError(f"rounds from {first} on are to train blocks {blocks}, by this client {trains}")
        for round, (block, mine) in enumerate(zip(blocks, trains, strict=True), start=first):
            self._said[round] = Turn(block, mine)

    def passed(self, round: int) -> None:
        """The client has gone on to a later round: what is on the way by then is asked for, and nothing before it."""
        for before in [before for before in self._said if before < round - self._in_flight]:
            del self._said[before]

    def knows(self, round: int) -> bool:
        """Whether there is a turn to be told of a round."""
        return self._schedule is not None or round in self._said

    def turn(self, round: int) -> Turn | None:
        """None: the broker has not said it (yet, or of a round before our start, or it was passed long ago)."""
        if self._schedule is not None:
            return Turn(self._schedule.block(round), True)
        return self._said.get(round)
