"""What a chaos run does to whom and when: a list of faults that follows from a seed alone.

A fault waits for the run's progress, not for a clock, so that a plan means the same on a slow machine and ends when
the run does. Some follow one another at once, so that they meet a process that is still coming back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill", "stop", "cut", "stall"]

BROKER = "broker"

TAIL = 150
"""Rounds after the last fault, in which everybody comes back and the run ends by itself."""

_BROKER_SHARE = 0.4  # of kills and stops
_OTHERS_PER_KILL = 0.5
_AT_ONCE = 0.25  # share of the faults that wait for no progress


@dataclass(frozen=True)
class Fault:
    """kill: SIGKILL, and the same command again after `lasts_s`. stop: SIGSTOP, and SIGCONT after `lasts_s`. cut: the
    client's connection is reset. stall: it stays open and carries nothing for `lasts_s`.

    Happens `delay_s` after `rounds` are committed, and after every fault before it.
    """

    rounds: int
    delay_s: float
    kind: Kind
    target: str
    lasts_s: float


@dataclass(frozen=True)
class Shape:
    """What is drawn from. linked: clients whose connection can be cut and stalled. spacing: rounds between faults, on
    the average. longest_s: of a stop or a stall."""

    kills: int
    clients: tuple[str, ...]
    linked: tuple[str, ...]
    spacing: int
    longest_s: float


def plan(seed: int, shape: Shape) -> tuple[Fault, ...]:
    """As many kills as asked for, half as many other faults among them; the last one is a kill."""
    rng = random.Random(seed)
    found: list[Fault] = []
    rounds, kills = 0, 0
    while kills < shape.kills:
        if rng.random() >= _AT_ONCE:
            rounds += rng.randint(1, 2 * shape.spacing)
        kind: Kind = "kill" if rng.random() < 1 / (1 + _OTHERS_PER_KILL) else rng.choice(_others(shape))
        anybody = BROKER if rng.random() < _BROKER_SHARE else rng.choice(shape.clients)
        target = anybody if kind in ("kill", "stop") else rng.choice(shape.linked)
        found.append(Fault(rounds, rng.uniform(0.0, 0.5), kind, target, _lasts_s(rng, kind, shape.longest_s)))
        kills += kind == "kill"
    return tuple(found)


def rounds(faults: tuple[Fault, ...]) -> int:
    """Rounds of a run that takes all of these."""
    return faults[-1].rounds + TAIL


def _others(shape: Shape) -> tuple[Kind, ...]:
    return ("stop", "cut", "stall") if shape.linked else ("stop",)


def _lasts_s(rng: random.Random, kind: Kind, longest_s: float) -> float:
    """A killed process mostly comes back at once; others are away for anything up to the longest."""
    if kind == "cut":
        return 0.0
    if kind == "kill":
        return rng.choice((0.0, 0.0, 0.0, rng.uniform(0.0, 1.0)))
    return rng.uniform(0.0, longest_s)
