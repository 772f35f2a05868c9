"""One round at the broker: who has answered, what is held, and whether it may close.

    OPEN ──close──▸ FOLDING ──commit──▸ COMMITTED
      ▴                │
      └───reopen───────┘     a contribution turned out unfit while it was folded

A client answers a round by a complete contribution, by abstaining, or by a contribution that is refused. `decide` is
a pure function that returns the decision together with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from parablock.aggregation import Contribution

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from parablock.messages import Offer
    from parablock.transfer import Incoming


class RoundState(Enum):
    OPEN = "open"
    FOLDING = "folding"
    COMMITTED = "committed"


TRANSITIONS = {
    (RoundState.OPEN, "close"): RoundState.FOLDING,
    (RoundState.FOLDING, "reopen"): RoundState.OPEN,
    (RoundState.FOLDING, "commit"): RoundState.COMMITTED,
}


@dataclass
class Upload:
    """A contribution that has begun to arrive. session: which process of the client sends it; no other may go on."""

    session: str
    offer: Offer
    incoming: Incoming


@dataclass
class Round:
    number: int
    block: int
    state: RoundState = RoundState.OPEN
    uploads: dict[str, Upload] = field(default_factory=dict)  # by client
    out: set[str] = field(default_factory=set)  # abstained, or refused
    first_done_at: float | None = None  # when the first contribution was complete
    why: str = ""  # the reason for which it was closed

    def move(self, action: str) -> None:
        assert (self.state, action) in TRANSITIONS, f"round {self.number} is {self.state.value}, cannot {action}"
        self.state = TRANSITIONS[self.state, action]

    @property
    def done(self) -> set[str]:
        """Clients whose contribution is complete."""
        return {client for client, upload in self.uploads.items() if upload.incoming.done}

    def contributions(self) -> tuple[Contribution, ...]:
        """The complete contributions in roster order, which is the order of names."""
        return tuple(
            Contribution(client, self.uploads[client].offer.weight, tuple(self.uploads[client].incoming.pieces))
            for client in sorted(self.done)
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

    members: the live clients that take part in it. present: those, and the live clients that begin with a later round.

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
    return Decision(False, f"waiting for {', '.join(sorted(waiting))}")
