"""The learning rate of a round, which all its steps share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parablock import sections


def learning_rate(settings: sections.Solver, round: int, rounds: int) -> float:
    """The rate of `round`, which counts from 0, in a run of `rounds` rounds.

    It rises linearly over the first share of the rounds (`warmup`) and reaches lr in the round after them. From there
    it stays (constant), or falls along half a cosine or a line that would be at lr_final * lr in the round after the
    last: a last round at rate 0 would be exchanged for nothing.
    """
    assert 0 <= round < rounds, f"round {round} of a run of {rounds}"
    rising = int(settings.warmup * rounds + 1e-9)  # 0.29 of 100 is 28.999999999999996
    if round < rising:
        return settings.lr * (round + 1) / (rising + 1)
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = (round - rising) / (rounds - rising)
    left = 1.0 - progress if settings.lr_schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return settings.lr * (settings.lr_final + (1.0 - settings.lr_final) * left)
