"""What the coordinator is told (`Event`) and what it asks for (`Effect`); see `parablock.coordinator`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parablock.aggregation import Contribution
    from parablock.messages import Evaluated, Heartbeat, Landed
    from parablock.saved import Entry
    from parablock.transfer import Encoded
    from parablock.unmasking import Unmasking
    from parablock.verdict import Verdict
    from parablock.wire import Buffer, Envelope

NOBODY = b""
"""No peer's address."""

LONGEST_QUOTE = 200
"""Characters of what a peer gives as its reason that are written down."""

# Events


@dataclass(frozen=True)
class Received:
    """A decoded message. `peer` is the transport's address of the sender, which somebody else may have taken.

    client: whose key the connection has, by the broker's own list; None: it has none.
    """

    peer: bytes
    envelope: Envelope
    client: str | None = None


@dataclass(frozen=True)
class Malformed:
    """Frames that are no message, or a connection that breaks rules below those of messages; `reason` says why.

    peer: `NOBODY` where it has said nothing yet. client: as in `Received`.
    """

    peer: bytes
    reason: str
    client: str | None = None


@dataclass(frozen=True)
class Revoked:
    """The broker's list does not know the key of this client any more."""

    client: str


@dataclass(frozen=True)
class Measured:
    """The answer to the last `Measure` of an attempt: who counts, and how much of each."""

    round: int
    attempt: int
    verdict: Verdict


@dataclass(frozen=True)
class Folded:
    """The answer to `Fold`: the next chunk of the block's new value, as it travels.

    moved: with the last chunk of an attempt, the root mean square of what it does to the block, x' − x; 0 with those
    before, and where the settings have no use for it.
    """

    round: int
    attempt: int
    chunk: Encoded
    moved: float = 0.0


@dataclass(frozen=True)
class Unfit:
    """The other answer to `Fold`, and to any `Measure`: contributions that must not be counted, by
    `Contribution.client`, and why.

    Nothing was folded.
    """

    round: int
    attempt: int
    reasons: dict[str, str]


@dataclass(frozen=True)
class Stored:
    """The answer to `Store`. values: the block's new value, float32 bytes that nobody changes any more; None where
    nobody was counted."""

    round: int
    attempt: int
    values: Buffer | None


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Stop:
    """End this broker now, though the run is not complete. returns: another one is to go on with the run, so that the
    clients wait for it."""

    reason: str
    returns: bool = False


Event = Received | Malformed | Revoked | Measured | Folded | Unfit | Stored | Tick | Stop


# Effects


@dataclass(frozen=True)
class Send:
    peer: bytes
    envelope: Envelope


@dataclass(frozen=True)
class Measure:
    """Look at chunk `index` of these contributions, where all of each must be seen before any of it is folded
    (`Config.measured`), and answer with `Unfit`, or with `Measured` after the block's last chunk, or else not at all.

    Of one attempt the chunks come in order, and before its folds. A higher attempt begins anew. bad: how many of the
    contributions may be bad, where `robust.rule` bears any.
    """

    round: int
    block: int
    attempt: int
    index: int
    contributions: tuple[Contribution, ...]
    bad: int = 0


@dataclass(frozen=True)
class Fold:
    """Check and fold chunk `index` of these contributions, and answer with `Folded` or `Unfit`.

    Of one attempt the chunks come in order. A higher attempt begins the block anew, with other contributions. bad: as
    in `Measure`. unmasking: what takes the masks off their sum, where they are masked; they may be others from chunk to
    chunk then.
    """

    round: int
    block: int
    attempt: int
    index: int
    contributions: tuple[Contribution, ...]
    bad: int = 0
    unmasking: Unmasking | None = None


@dataclass(frozen=True)
class Store:
    """Every chunk of the attempt is folded, and it shall count: make the block and the entry durable, and answer with
    `Stored`. attempt 0: nobody is counted, and there is no block to store. Until then nobody hears of the commit."""

    round: int
    block: int
    attempt: int
    entry: Entry


@dataclass(frozen=True)
class Committed:
    """A round is closed. loss: weighted mean over the contributors (None without any), without what counts late.

    late: contributions that missed their round: this one, where they were on their way, or an earlier one, where they
    were offered since the commit before. folded_late: what was counted beside the contributors', as CLIENT@ROUND.
    left_out: whose complete contribution was not counted, as the settings of `robust` will have it. clipped: of what
    was counted, what was cut shorter.
    charged: as in `saved.Entry`.
    bytes_up: payload of what came, counted or not. bytes_down: of the new block to all, without what was sent of
    attempts that were given up.
    """

    round: int
    block: int
    contributors: tuple[str, ...]
    late: int
    loss: float | None
    bytes_up: int
    bytes_down: int
    reason: str
    folded_late: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()
    charged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reported:
    """What a client says about itself: `Landed`, `Evaluated` and `Heartbeat` messages."""

    client: str
    message: Landed | Evaluated | Heartbeat


@dataclass(frozen=True)
class Note:
    """Something worth a line in the run's events: `kind` is one word, `client` whom it concerns ("": nobody).

    told: else it is one of too many of its kind: what follows from it follows, and no line is written.
    """

    kind: str
    client: str
    text: str
    told: bool = True


@dataclass(frozen=True)
class Drop:
    """Close the connection on which this peer has just spoken, after what was sent to it, and take nothing more of it.
    NOBODY: only those of the client.

    client: whose key it is; None: nobody's. seconds: for so long no connection with that key is let in, nor one that
    there is kept; 0: nothing is barred.
    """

    peer: bytes
    reason: str
    client: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Over:
    """The run has ended; the broker may go."""

    complete: bool
    reason: str


Effect = Send | Measure | Fold | Store | Committed | Reported | Note | Drop | Over
