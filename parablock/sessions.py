"""A worker's session at the broker: what it may say, how far it has come, and the blocks on their way to it.

Data and the table of what is allowed; what is done about it is `parablock.coordinator`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from parablock.messages import (
    Abstain,
    Chunk,
    Commit,
    Credit,
    Evaluated,
    Heartbeat,
    Hello,
    Join,
    Keys,
    Landed,
    Leave,
    Message,
    Offer,
    Shares,
    Start,
    Unmasked,
    Waiting,
)
from parablock.wire import Envelope

if TYPE_CHECKING:
    from parablock.transfer import Encoded, Outgoing, Payload


class SessionState(Enum):
    GREETED = "greeted"
    JOINED = "joined"
    ACTIVE = "active"


_GREETED, _JOINED, _ACTIVE = SessionState.GREETED, SessionState.JOINED, SessionState.ACTIVE

ALLOWED: dict[type[Any], tuple[SessionState, ...]] = {
    Hello: (_GREETED, _JOINED, _ACTIVE),
    Join: (_GREETED, _JOINED, _ACTIVE),
    Heartbeat: (_GREETED, _JOINED, _ACTIVE),
    Leave: (_GREETED, _JOINED, _ACTIVE),
    Offer: (_ACTIVE,),
    Chunk: (_ACTIVE,),
    Abstain: (_ACTIVE,),
    Credit: (_ACTIVE,),
    Landed: (_ACTIVE,),
    Evaluated: (_ACTIVE,),
    Waiting: (_ACTIVE,),
    Keys: (_ACTIVE,),
    Shares: (_ACTIVE,),
    Unmasked: (_ACTIVE,),
}


def takes_part(message: Message) -> bool:
    """Whether only a worker that believes itself on the roster says this."""
    if isinstance(message, Heartbeat):
        return message.state in ("waiting", "training")
    return not isinstance(message, Join | Leave)


class Shipment:
    """A block on its way to many: the chunks, and the messages that carry them, each made once.

    attempt: the fold that made it; 0: a block in full, for who does not hold the version before.
    """

    def __init__(self, run: str, epoch: int, round: int, block: int, attempt: int, payload: Payload) -> None:
        self.round = round
        self.block = block
        self.attempt = attempt
        self.payload = payload
        self._run = run
        self._epoch = epoch
        self._envelopes: dict[int, Envelope] = {}

    def envelope(self, offset: int, chunk: Encoded) -> Envelope:
        if offset not in self._envelopes:
            header = Chunk(self.round, self.block, self.attempt, offset, chunk.checksum)
            self._envelopes[offset] = Envelope(self._run, self._epoch, header, chunk.payload)
        return self._envelopes[offset]


@dataclass
class Version:
    """A block as a round made it. counted: the clients whose contributions are in it.

    base: the round that made the version before, −1 for the base model's. change: as it was sent to who held that one,
    while somebody may still hold part of it. full: as it is sent to all others.
    """

    round: int
    base: int
    counted: tuple[str, ...]
    change: Shipment | None
    full: Shipment


@dataclass
class Download:
    """A block on its way to one worker; without a commit as long as it is not sure to count.

    progress_at: when it last confirmed more, in seconds.
    """

    shipment: Shipment
    outgoing: Outgoing
    progress_at: float
    commit: Commit | None = None


@dataclass
class Session:
    """peer: the transport's address. token: tells one process of a name from the next. since: when it greeted.

    client: whose key its messages come by, and no others are of this session; None: unencrypted connections'.
    waits_for: its training stands still until this round's block is there. Times in seconds.
    """

    peer: bytes
    name: str
    token: str
    heard_at: float
    client: str | None = None
    state: SessionState = SessionState.GREETED
    start: Start | None = None  # said when it became active
    downloads: dict[int, Download] = field(default_factory=dict)  # by round
    waits_for: int = -1
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.heard_at
