"""A worker's side of the conversation: its states, and what the broker may say in which. What is done about it is
`parablock.participant`'s business, as `parablock.sessions` is the coordinator's table.

    CALLING ──Terms──▸ PREPARING ──Prepared──▸ JOINING ──Welcome──▸ WAITING ──Start──▸ TRAINING ──Finish──▸ LEAVING
       ▴                                                                                  │                    │
       └────────────────────────────── Rejoin (keeps what was prepared) ──────────────────┘                    ▾
    any state ──Refused, Stopped for good, out of patience──▸ GONE ◂──Goodbye──────────────────────────────────┘
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from parablock.messages import (
    Chunk,
    Commit,
    Credit,
    Dealt,
    Goodbye,
    Heartbeat,
    Late,
    Refused,
    Rejected,
    Rejoin,
    Roll,
    Start,
    Stopped,
    Terms,
    Unmask,
    Welcome,
)


class State(Enum):
    CALLING = "calling"
    PREPARING = "preparing"
    JOINING = "joining"
    WAITING = "waiting"
    TRAINING = "training"
    LEAVING = "leaving"
    GONE = "gone"


_LIVE = tuple(state for state in State if state is not State.GONE)
_SESSION = State.JOINING, State.WAITING, State.TRAINING

EXPECTED: dict[type[Any], tuple[State, ...]] = {
    Terms: (State.CALLING,),
    Welcome: (State.JOINING,),
    Start: _SESSION,
    Commit: _SESSION,
    Chunk: _SESSION,
    Credit: (State.TRAINING,),
    Rejected: (State.TRAINING,),
    Late: (State.TRAINING,),
    Roll: (State.TRAINING,),
    Dealt: (State.TRAINING,),
    Unmask: (State.TRAINING,),
    Heartbeat: _LIVE,
    Rejoin: (State.PREPARING, *_SESSION),
    Goodbye: (State.LEAVING,),
    Refused: _LIVE,
    Stopped: _LIVE,
}
"""A message that does not fit was delayed or repeated, and is passed over."""
