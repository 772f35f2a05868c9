"""One round at the broker: who has answered, what is held, what is folded of it, and whether it may close.

    OPEN ──close──▸ CLOSING ──store──▸ STORING ──commit──▸ COMMITTED
      ▴                │
      └────reopen──────┘     a contribution turned out unfit while it was folded

Folding does not wait for the close: an `Attempt` folds chunk c as soon as it is in from everybody who is expected to
count. If in the end others count, another attempt folds all of it anew. A client answers a round by a complete
contribution, by abstaining, or by a contribution that is refused. `decide` is a pure function that returns the
decision together with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from parablock.aggregation import Contribution

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from parablock.messages import Offer
    from parablock.saved import Entry
    from parablock.sessions import Shipment
    from parablock.transfer import Incoming
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
    """A contribution that has begun to arrive. session: which process of the client sends it; no other may go on."""

    session: str
    offer: Offer
    incoming: Incoming
    pieces: list[Buffer] = field(default_factory=list)  # its chunks, encoded, uncopied


@dataclass
class Attempt:
    """A fold of the contributions of `clients`, in roster order, chunk by chunk; what it makes leaves at once.

    missing: for each chunk, how many of the clients have not sent it yet. moved: see `coordinator_events.Folded`.
    """

    clients: tuple[str, ...]
    missing: list[int]
    shipment: Shipment
    moved: float = 0.0

    @property
    def number(self) -> int:
        return self.shipment.attempt

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
    out: set[str] = field(default_factory=set)  # abstained, or refused
    first_done_at: float | None = None  # when the first contribution was complete
    attempts: int = 0  # how many were begun
    attempt: Attempt | None = None  # the newest one
    why: str = ""  # the reason for which it was closed
    entry: Entry | None = None  # what is said of it for good, from when it is stored

    def move(self, action: str) -> None:
        assert (self.state, action) in TRANSITIONS, f"round {self.number} is {self.state.value}, cannot {action}"
        self.state = TRANSITIONS[self.state, action]

    def begin(self, client: str, upload: Upload) -> None:
        """A contribution begins, perhaps in place of one that another process of the client had begun."""
        if client in self.uploads:
            self.drop(client)
        self.uploads[client] = upload

    def drop(self, client: str) -> None:
        """Forget what a client has sent, and the attempt that counted it."""
        del self.uploads[client]
        self.done.discard(client)
        if self.attempt is not None and client in self.attempt.clients:
            self.attempt = None

    def contributions(self, index: int) -> tuple[Contribution, ...]:
        """Chunk `index` of every contribution that the attempt counts, in its order."""
        assert self.attempt is not None
        uploads = [self.uploads[client] for client in self.attempt.clients]
        return tuple(
            Contribution(client, upload.offer.weight, upload.offer.steps, upload.pieces[index])
            for client, upload in zip(self.attempt.clients, uploads, strict=True)
        )


@dataclass(frozen=True)
class Decision:
    close: bool
    reason: str


def decide(
    round: Round,
    members: AbstractSet[str],
    present: AbstractSet[str],
    quorum: int,
    deadline_s: float,
    now: float,
) -> Decision:
    """Whether an open round closes at `now`.

    members: the live clients that shall contribute to it. present: those, and the live clients that sit it out or begin
    with a later round.

    A contribution of a client that has gone since still counts. A round in which every voter has answered closes
    even with fewer contributions than the quorum (none leaves the block as it was): enough clients are there, they
    only have nothing to add, and waiting would not change it.
    """
    done = round.done
    voters = members | done
    waiting = voters - done - round.out
    there = len(present | voters)
    if there < quorum:
        return Decision(False, f"{there} of at least {quorum} clients are there")
    if not waiting:
        return Decision(True, f"{len(voters)} of {len(voters)} clients have answered")
    if deadline_s and round.first_done_at is not None and now >= round.first_done_at + deadline_s:
        if len(done) >= quorum:
            return Decision(True, f"the deadline of {deadline_s:g} s has passed with {len(done)} contributions")
        return Decision(False, f"the deadline has passed, but only {len(done)} of {quorum} contributions are in")
    names = ", ".join(sorted(waiting)[:5]) + (" and others" if len(waiting) > 5 else "")
    return Decision(False, f"waiting for {names}")
