"""What the participant is told (`Event`) and what it asks for (`Effect`); see `parablock.participant`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.masker import Masker
    from parablock.messages import Evaluated, Landed, Offer
    from parablock.transfer import Encoded, Payload, Stored
    from parablock.wire import Buffer, Envelope

# Events


@dataclass(frozen=True)
class Received:
    """A decoded message from the broker."""

    envelope: Envelope


@dataclass(frozen=True)
class Held:
    """A contribution that an earlier process of this worker has kept. payload: complete, as it travels."""

    offer: Offer
    payload: Payload


@dataclass(frozen=True)
class Kept:
    """What an earlier process of this worker has left, in the run `run`.

    versions: as in `messages.Join`, of what is in the model. position: the first round that it has neither trained nor
    passed. held: its contributions to rounds before that, of which nobody has said that they are closed.
    """

    run: str
    versions: tuple[int, ...]
    position: int
    held: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """Model and data are loaded, as the terms said. kept: see `Kept`; what is of another run is passed over."""

    config: Config
    manifest: Manifest
    base: str
    tokenizer: str
    rows: int
    kept: Kept | None = None


@dataclass(frozen=True)
class Contribute:
    """A round was trained: the chunks of its delta follow, each when it is encoded.

    weight: tokens trained on, in so many steps.
    """

    round: int
    block: int
    weight: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Ready:
    """The next chunk of a contribution, which nobody changes any more."""

    round: int
    chunk: Encoded


@dataclass(frozen=True)
class OnDisk:
    """What the contribution to a round was encoded into is on disk, each chunk to be had again from there."""

    round: int
    again: tuple[Callable[[], Buffer], ...]


@dataclass(frozen=True)
class Fetched:
    """What `Fetch` has asked for."""

    round: int
    index: int
    chunk: Encoded


@dataclass(frozen=True)
class Withhold:
    """A round was trained to no use (the loss diverged): tell the broker not to wait."""

    round: int
    reason: str


@dataclass(frozen=True)
class Withdraw:
    """The contribution to a round cannot be given after all: it cannot be masked."""

    round: int
    reason: str


@dataclass(frozen=True)
class SitOut:
    """A round is trained by others; we have gone on to the next."""

    round: int


@dataclass(frozen=True)
class Say:
    """Pass a report on to the broker."""

    message: Landed | Evaluated


@dataclass(frozen=True)
class Progress:
    """Where training is, for the next heartbeat."""

    round: int
    step: int


@dataclass(frozen=True)
class Wait:
    """Training stands still until the block of `round` has landed."""

    round: int


@dataclass(frozen=True)
class Finish:
    """Leave the run: it is done, or the user wants to end it."""

    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Denied:
    """The broker lets us in no more, or never has; `reason` says why, and what to do."""

    reason: str


Event = (
    Received
    | Prepared
    | Contribute
    | Ready
    | OnDisk
    | Fetched
    | Withhold
    | Withdraw
    | SitOut
    | Say
    | Progress
    | Wait
    | Finish
    | Denied
    | Tick
)


# Effects


@dataclass(frozen=True)
class Send:
    envelope: Envelope


@dataclass(frozen=True)
class Fetch:
    """Read a chunk of a contribution back into memory, check that it is what it was, and answer with `Fetched`."""

    round: int
    index: int
    stored: Stored


@dataclass(frozen=True)
class Prepare:
    """Load model and data by these settings (JSON), then answer with `Prepared`. name: what we are called there."""

    config: str
    name: str


@dataclass(frozen=True)
class Started:
    """Train from `round` on, or from where training is if that is later.

    next: of rounds before it that are still guessed only the `pending` ones will be told.
    """

    round: int
    clients: int
    next: int
    pending: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mask:
    """Encode the contribution to a round with this, from its first chunk on, when there is one.

    None: what it was encoded with before is of no use any more; another one may come.
    """

    round: int
    masker: Masker | None


@dataclass(frozen=True)
class Took:
    """Chunk `index` of a block that may come to count. Of one attempt they come in order, each once."""

    round: int
    block: int
    attempt: int
    index: int
    payload: Buffer


@dataclass(frozen=True)
class Dropped:
    """What was taken of this attempt will not be completed."""

    round: int
    attempt: int


@dataclass(frozen=True)
class Arrived:
    """A round is committed and every chunk of its block was taken. contributors 0: it changed nothing.

    attempt: which one counts. base: the round that made the version of the block before (−1: none did). ahead_s: for
    how long the own contribution had been complete when the last one that counts was.
    """

    round: int
    block: int
    attempt: int
    base: int
    contributors: int
    counted: bool
    began: float
    ended: float
    ahead_s: float = 0.0


@dataclass(frozen=True)
class Uploaded:
    """The broker holds the whole contribution."""

    round: int
    began: float
    ended: float


@dataclass(frozen=True)
class Dismissed:
    """The contribution to a round was not counted."""

    round: int
    reason: str


@dataclass(frozen=True)
class Deferred:
    """The contribution to a round, which was dismissed, may still count in a later round of its block."""

    round: int


@dataclass(frozen=True)
class Settled:
    """What became of a contribution that was late. into: the round that it has counted in; −1: none, and why."""

    round: int
    into: int
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something that the user of this worker should read."""

    text: str


class End(Enum):
    DONE = "done"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True)
class Gone:
    """The session has ended."""

    end: End
    reason: str


Effect = (
    Send
    | Fetch
    | Prepare
    | Started
    | Mask
    | Took
    | Dropped
    | Arrived
    | Uploaded
    | Dismissed
    | Deferred
    | Settled
    | Notice
    | Gone
)
