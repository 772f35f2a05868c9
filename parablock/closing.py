"""The close of a round: whether its deadline has passed, who is expected to count, and what is said of it for good.

Pure functions of what is known; when it closes is decided in `parablock.rounds`, and what follows is done in
`parablock.collection`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parablock.rounds import named
from parablock.saved import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from parablock.rounds import Round
    from parablock.sections import Rounds


def passed(round: Round, policy: Rounds, now: float) -> bool:
    """Whether the round's deadline has."""
    return (
        bool(policy.deadline_s) and round.first_done_at is not None and now >= round.first_done_at + policy.deadline_s
    )


def expected_of(
    round: Round, members: AbstractSet[str], tardy: AbstractSet[str], policy: Rounds, quorum: int, now: float
) -> tuple[str, ...]:
    """Who will count, in roster order, as far as one can tell; empty as long as one of them has offered nothing.

    Where rounds have a deadline, those who were late last time, `tardy`, are expected to be late again. Past it only
    those count who have answered: what they make leaves, so that it is there when somebody needs it, and is made anew
    if another one is still in time. members: the live clients that shall contribute.
    """
    voters = (members | round.done) - round.out
    if passed(round, policy, now) and len(round.done) >= quorum:
        return tuple(sorted(round.done))
    if policy.deadline_s:
        in_time = voters - (tardy - round.done)
        voters = in_time if len(in_time) >= quorum else voters
    if len(voters) < quorum or not all(name in round.uploads for name in voters):
        return ()
    return tuple(sorted(voters))


def entry_of(
    round: Round,
    *,
    base: int,
    late: int,
    nbytes_up: int,
    receivers: int,
    agenda: Mapping[str, Any],
    clients: tuple[str, ...],
    tardy: tuple[str, ...],
    charged: tuple[str, ...],
    tells_losses: bool,
) -> Entry:
    """The entry of a round in which everything is settled. receivers: how many sessions get the new block.

    charged: as in `Entry`. tells_losses: or else clients keep theirs to themselves.
    """
    attempt = round.attempt
    counted = attempt.counted if attempt is not None else ()
    offers = [round.uploads[name].offer for name in counted]
    return Entry(
        round=round.number,
        block=round.block,
        attempt=attempt.number if attempt is not None else 0,
        base=base,
        contributors=counted,
        weights=tuple(offer.weight for offer in offers),
        steps=tuple(offer.steps for offer in offers),
        losses=tuple(offer.loss for offer in offers) if tells_losses else (),
        moved=attempt.moved if attempt is not None else 0.0,
        late=late,
        bytes_up=nbytes_up,
        bytes_down=receivers * (attempt.shipment.payload.nbytes if attempt is not None else 0),
        reason=_reason(round),
        agenda=agenda,
        clients=clients,
        tardy=tardy,
        folded_late=attempt.folded_late if attempt is not None else (),
        left_out=tuple(sorted(round.left_out)),
        clipped=attempt.clipped if attempt is not None else (),
        charged=charged,
    )


def _reason(round: Round) -> str:
    attempt = round.attempt
    if attempt is None:
        return f"0 contributions; {round.why}"
    late = f" and {len(attempt.late)} late" if attempt.late else ""
    left_out = f"; left out: {named(attempt.left_out.keys())}" if attempt.left_out else ""
    clipped = f"; clipped: {named(set(attempt.clipped))}" if attempt.clipped else ""
    return f"{len(attempt.counted)} contributions{late}{left_out}{clipped}; {round.why}"
