"""One round at the broker: who has answered, what is held, what is folded of it, and whether it may close.

    OPEN ──close──▸ CLOSING ──store──▸ STORING ──commit──▸ COMMITTED
      ▴                │
      └────reopen──────┘     a contribution turned out unfit while it was folded

Folding does not wait for the close: an `Attempt` folds chunk c as soon as it is in from everybody who is expected to
count; where contributions are measured first, it measures chunk c then, and folds after the last one has been. If in
the end others count, another attempt does all of it anew. A client answers a round by a complete
contribution, by abstaining, or by a contribution that is refused. `decide` is a pure function that returns the
decision together with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from parablock.aggregation import Contribution
from parablock.coordinator_events import Fold, Measure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from parablock.late import Late
    from parablock.messages import Offer
    from parablock.quorum import Quorum
    from parablock.saved import Entry
    from parablock.sections import Rounds
    from parablock.sessions import Shipment
    from parablock.transfer import Incoming
    from parablock.verdict import Verdict
    from parablock.wire import Buffer


class RoundState(Enum):
    OPEN = "open"
    CLOSING = "closing"
    STORING = "storing"
    COMMITTED = "committed"


TRANSITIONS = {
    (RoundState.OPEN, "close"): RoundState.CLOSING,
    (RoundState.CLOSING, "reopen"): RoundState.OPEN,
    (RoundState.CLOSING, "store"): RoundState.STORING,
    (RoundState.STORING, "commit"): RoundState.COMMITTED,
}


@dataclass
class Upload:
    """A contribution that has begun to arrive. session: which process of the client sends it; no other may go on.

    progress_at: when the newest chunk came, or more was allowed to come; in seconds. done_at: when the last one came.
    """

    session: str
    offer: Offer
    incoming: Incoming
    progress_at: float
    done_at: float = 0.0
    pieces: list[Buffer] = field(default_factory=list)  # its chunks, encoded, uncopied


@dataclass
class Attempt:
    """A fold of the contributions of `clients`, in roster order, chunk by chunk; what it makes leaves at once.

    late: complete ones of earlier rounds that count after those, in roster order too. missing: for each chunk, how many
    of the clients have not sent it yet. measured: a verdict is to be given on them before anything is folded. bad: how
    many of them may be. moved: see `coordinator_events.Folded`.
    """

    clients: tuple[str, ...]
    late: tuple[Late, ...]
    missing: list[int]
    shipment: Shipment
    measured: bool = False
    bad: int = 0
    verdict: Verdict | None = None
    moved: float = 0.0

    @property
    def number(self) -> int:
        return self.shipment.attempt

    @property
    def counted(self) -> tuple[str, ...]:
        """Of its clients those that count, as far as one can tell."""
        return tuple(client for client in self.clients if client not in self.left_out)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Of its clients those that do not, and why."""
        return self.verdict.left_out if self.verdict is not None else {}

    @property
    def clipped(self) -> tuple[str, ...]:
        """Of what it counts, what is cut shorter."""
        return self.verdict.clipped if self.verdict is not None else ()

    @property
    def folded_late(self) -> tuple[str, ...]:
        """Names of what it counts beside its clients', in the order of the fold."""
        return tuple(late.label for late in self.late)

    def take(self, client: str, index: int) -> bool:
        """A client's chunk has come; true if it was the last one that was missing."""
        if client not in self.clients:
            return False
        self.missing[index] -= 1
        return not self.missing[index]

    @property
    def complete(self) -> bool:
        """Every chunk is folded."""
        return self.shipment.payload.complete


@dataclass
class Round:
    number: int
    block: int
    state: RoundState = RoundState.OPEN
    uploads: dict[str, Upload] = field(default_factory=dict)  # by client
    done: set[str] = field(default_factory=set)  # clients whose contribution is complete
    out: set[str] = field(default_factory=set)  # abstained, refused, or left out
    first_done_at: float | None = None  # when the first contribution was complete
    attempts: int = 0  # how many were begun
    attempt: Attempt | None = None  # the newest one
    why: str = ""  # the reason for which it was closed
    unfit: set[str] = field(default_factory=set)  # of those that are out: whose contribution was refused
    left_out: Mapping[str, str] = field(default_factory=dict)  # whose complete contribution does not count, and why
    began: set[str] = field(default_factory=set)  # clients of whose contribution something has left, or may have
    entry: Entry | None = None  # what is said of it for good, from when it is stored

    def move(self, action: str) -> None:
        assert (self.state, action) in TRANSITIONS, f"round {self.number} is {self.state.value}, cannot {action}"
        self.state = TRANSITIONS[self.state, action]

    def begin(self, client: str, upload: Upload) -> None:
        """A contribution begins, perhaps in place of one that another process of the client had begun."""
        if client in self.uploads:
            self.drop(client)
        self.uploads[client] = upload
        self.began.add(client)

    def drop(self, client: str) -> None:
        """Forget what a client has sent, and the attempt that counted it."""
        del self.uploads[client]
        self.done.discard(client)
        if self.attempt is not None and client in self.attempt.clients:
            self.attempt = None

    def refuse(self, client: str) -> None:
        """What it has sent must not be counted, whatever else there is."""
        self.drop(client)
        self.out.add(client)
        self.unfit.add(client)

    def ahead_s(self, counted: Sequence[str]) -> dict[str, float]:
        """By client that counts, seconds from the end of its contribution to that of the last one."""
        done_at = {name: self.uploads[name].done_at for name in counted}
        last = max(done_at.values(), default=0.0)
        return {name: last - ended for name, ended in done_at.items()}

    def settle_left_out(self) -> None:
        """Who is `left_out` now is for good: has answered, and is neither counted nor late."""
        for client in self.left_out:
            del self.uploads[client]
        self.done -= self.left_out.keys()
        self.out |= self.left_out.keys()

    def next(self, index: int) -> Measure | Fold:
        """What is to be done about chunk `index`, which is in from everybody whom the attempt counts."""
        attempt = self.attempt
        assert attempt is not None
        what = self.number, self.block, attempt.number, index
        if attempt.measured and attempt.verdict is None:
            return Measure(*what, self._contributions(attempt, index), attempt.bad)
        return Fold(*what, self._contributions(attempt, index), attempt.bad)

    def _contributions(self, attempt: Attempt, index: int) -> tuple[Contribution, ...]:
        """Chunk `index` of every contribution that the attempt counts, in its order."""
        factors = attempt.verdict.factors if attempt.verdict is not None else {}
        parts = [(client, self.uploads[client], 0) for client in attempt.counted]
        parts += [(late.label, late.upload, late.missed) for late in attempt.late]
        return tuple(
            Contribution(
                name, upload.offer.weight, upload.offer.steps, upload.pieces[index], missed, factors.get(name, 1.0)
            )
            for name, upload, missed in parts
        )


@dataclass(frozen=True)
class Decision:
    close: bool
    reason: str


def decide(
    round: Round,
    members: AbstractSet[str],
    present: AbstractSet[str],
    quorum: Quorum,
    policy: Rounds,
    now: float,
    standing: AbstractSet[str] = frozenset(),
    least: int = 0,
) -> Decision:
    """Whether an open round closes at `now`.

    members: the live clients that shall contribute to it. present: those, and the live clients that sit it out or begin
    with a later round. standing: whose training stands still until the round's block is there. least: contributions at
    the deadline, if that is more than the quorum.

    A contribution of a client that has gone since still counts. A round in which every voter has answered closes
    even with fewer contributions than the quorum (none leaves the block as it was): enough clients are there, they
    only have nothing to add, and waiting would not change it. Where the quorum was given up, one contribution is
    enough; without any a round closes only if somebody is there, and nobody is waited for. Past its deadline a round
    waits on only where that holds up nobody (`round.grace`).
    """
    done = round.done
    voters = members | done
    waiting = voters - done - round.out
    there = len(present | voters)
    needed, short = max(quorum.size, least), ""
    if there < quorum.size:
        if not quorum.given_up or policy.quorum_lost != "fewer":
            return Decision(False, f"{there} of at least {quorum.size} clients are there")
        if not done and (waiting or not there):
            return Decision(False, f"{there} of at least {quorum.size} clients are there, and none has contributed")
        needed, short = 1, f"; only {there} of at least {quorum.size} clients are there"
    if not waiting:
        return Decision(True, f"{len(voters)} of {len(voters)} clients have answered{short}")
    names = named(waiting)
    if not policy.deadline_s or round.first_done_at is None or now < round.first_done_at + policy.deadline_s:
        return Decision(False, f"waiting for {names}")
    if len(done) < needed:
        return Decision(False, f"the deadline has passed, but only {len(done)} of {needed} contributions are in")
    if policy.grace and not standing:
        return Decision(
            False, f"the deadline has passed, but nobody's training waits for the round, so {names} may come"
        )
    held_up = f", and {named(standing)} would wait" if policy.grace else ""
    passed = f"the deadline of {policy.deadline_s:g} s has passed with {len(done)} contributions"
    return Decision(True, f"{passed}{held_up}{short}")


def named(clients: AbstractSet[str]) -> str:
    """The first of them, for people."""
    return ", ".join(sorted(clients)[:5]) + (" and others" if len(clients) > 5 else "")
