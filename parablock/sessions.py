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
    Landed,
    Leave,
    Message,
    Offer,
    Start,
)

if TYPE_CHECKING:
    from parablock.transfer import Outgoing
    from parablock.wire import Buffer


class SessionState(Enum):
    GREETED = "greeted"
    JOINED = "joined"
    ACTIVE = "active"


_GREETED, _JOINED, _ACTIVE = SessionState.GREETED, SessionState.JOINED, SessionState.ACTIVE

ALLOWED: dict[type[Any], frozenset[SessionState]] = {
    Hello: frozenset({_GREETED, _JOINED, _ACTIVE}),
    Join: frozenset({_GREETED, _JOINED, _ACTIVE}),
    Heartbeat: frozenset({_GREETED, _JOINED, _ACTIVE}),
    Leave: frozenset({_GREETED, _JOINED, _ACTIVE}),
    Offer: frozenset({_ACTIVE}),
    Chunk: frozenset({_ACTIVE}),
    Abstain: frozenset({_ACTIVE}),
    Credit: frozenset({_ACTIVE}),
    Landed: frozenset({_ACTIVE}),
    Evaluated: frozenset({_ACTIVE}),
}


def takes_part(message: Message) -> bool:
    """Whether only a worker that believes itself on the roster says this."""
    if isinstance(message, Heartbeat):
        return message.state in ("waiting", "training")
    return not isinstance(message, Join | Leave)


@dataclass(frozen=True)
class Version:
    """A block as a round made it. counted: the clients whose contributions are in it."""

    round: int
    values: Buffer
    counted: tuple[str, ...]


@dataclass
class Download:
    """A block on its way to one worker. progress_at: when it last confirmed more, in seconds."""

    commit: Commit
    outgoing: Outgoing
    progress_at: float


@dataclass
class Session:
    """peer: the transport's address. token: tells one process of a name from the next. heard_at: in seconds."""

    peer: bytes
    name: str
    token: str
    heard_at: float
    state: SessionState = SessionState.GREETED
    start: Start | None = None  # said when it became active
    downloads: dict[int, Download] = field(default_factory=dict)  # by round
