"""How long it took to come back: from what was done to whom and when, and from what the clients heard after it.

Only what nothing else disturbed is a measure: a client that was itself killed, stopped or cut off before it was back
says nothing about the broker's restart, nor does one that had not yet begun when the broker went, or for which it went
again too soon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.chaos_plan import BROKER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bench.chaos_plan import Kind
    from bench.listener import Line


@dataclass(frozen=True)
class Act:
    """A fault that was performed. began, ended: time.monotonic; of a kill, ended is when the next process was started;
    of a cut both are the same. An act that was not ended is over at infinity."""

    kind: Kind
    target: str
    began: float
    ended: float


@dataclass(frozen=True)
class Recovery:
    """Seconds since the start of the process that had been killed.

    session_s: until this client was in session. training_s: until it next offered what it had trained.
    """

    client: str
    at: float
    session_s: float
    training_s: float


def of_broker(acts: Sequence[Act], lines: Mapping[str, Sequence[Line]]) -> Iterator[Recovery]:
    """Of each client after each of the broker's restarts."""
    for act in acts:
        if act.kind == "kill" and act.target == BROKER:
            for client in lines:
                if _in_session(client, lines[client], acts, act.began):
                    yield from _recovery(act, client, lines[client], acts)


def of_clients(acts: Sequence[Act], lines: Mapping[str, Sequence[Line]]) -> Iterator[Recovery]:
    """Of each client after each of its own restarts."""
    for act in acts:
        if act.kind == "kill" and act.target != BROKER:
            yield from _recovery(act, act.target, lines[act.target], acts)


def _in_session(client: str, lines: Sequence[Line], acts: Sequence[Act], at: float) -> bool:
    """Whether the client's process of that time, if there was one, had been in session."""
    started = max((line.at for line in lines if line.what == "start" and line.at < at), default=None)
    killed = max(
        (act.began for act in acts if act.kind == "kill" and act.target == client and act.began < at), default=0.0
    )
    return started is not None and started > killed


def _recovery(act: Act, client: str, lines: Sequence[Line], acts: Sequence[Act]) -> Iterator[Recovery]:
    """One, if nothing else happened to the client or the broker meanwhile."""
    before = max((line.epoch for line in lines if line.at < act.began), default=0)
    newer = act.target == BROKER  # a start that the old broker had sent may still have been on its way
    later = [line for line in lines if line.at >= act.ended]
    session = next((line.at for line in later if line.what == "start" and line.epoch >= before + newer), None)
    if session is None:
        return
    training = next((line.at for line in later if line.what == "contribute" and line.at >= session), None)
    if training is None:
        return
    for other in acts:
        if (
            other is not act
            and other.target in (client, BROKER)
            and other.began <= training
            and other.ended >= act.began
        ):
            return
    yield Recovery(client, act.ended, session - act.ended, training - act.ended)
