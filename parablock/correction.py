"""The block correction: what stands for a block while its mean is on the way, and how the mean replaces it.

When a client has finished round t on block b it holds x, the value from which it started, and its own Δ_i. Until
the broker's x' arrives, the model holds the guess x + α Δ_i. Because the next rounds train other blocks, replacing
the guess by x' is exact for block b; what remains is the effect of one round of staleness on the other blocks.

    own     α = 1: the client's own update. It holds client noise that the mean does not.
    stale   α = 0: the old value, the naive delay.
    shrink  α learnt per block from the last visits: the least-squares share ⟨x' − x, Δ_i⟩ / ⟨Δ_i, Δ_i⟩, smoothed;
            1/√n before the first observation, n being how many clients train in a round.

Where there are so few blocks that a later round trains b before x' has landed, the delta rule keeps what that round
added (`replacement`). With a single client the mean is its own update, so α is exactly 1 under `shrink`.
It is single as long as no block has landed that others have contributed to; that it was drawn by itself, or in time by
itself, for the rounds that it has trained does not make it single.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parablock.aggregation import PIECE

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.config import Pipeline

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Guess:
    """One round that is on the way: block, starting value x and own delta, of shape (numel,), and the share α of it."""

    block: int
    start: Vector
    delta: Vector
    alpha: float

    @property
    def value(self) -> Vector:
        """x + α Δ_i, rounded as the broker rounds x + Δ̄. Made when asked for: it is another copy of the block."""
        return self.start + np.float32(self.alpha) * self.delta


class Corrector:
    """Makes the guesses of one client and learns its α per block.

    clients: how many there are. sampled: how many of them train in a round, if that is not all.
    """

    def __init__(self, settings: Pipeline, clients: int, sampled: int | None = None) -> None:
        sampled = clients if sampled is None else sampled
        assert 1 <= sampled <= clients
        self._settings = settings
        self._alone = clients == 1
        self._first = 1.0 / math.sqrt(sampled)
        self._alpha: dict[int, float] = {}

    def alpha(self, block: int) -> float:
        match self._settings.correction:
            case "own":
                return 1.0
            case "stale":
                return 0.0
            case "shrink":
                return 1.0 if self._alone else self._alpha.get(block, self._first)
        raise AssertionError(f"no such correction: {self._settings.correction}")

    def guess(self, block: int, start: Vector, delta: Vector) -> Guess:
        return Guess(block, start, delta, self.alpha(block))

    def joined(self) -> None:
        """Others have contributed to a block, to which we did as well or did not: this client is not single."""
        self._alone = False

    def learn(self, guess: Guess, landed: Vector) -> float:
        """Take one observation of the block's α from what landed; returns ‖Δ_i − step‖ / ‖step‖, the drift.

        step = x' − x is what the broker did to the block, so that a server optimizer's share is learnt as well.
        The drift is 0 where both are 0, and 1e9 at most, also where they are too large to be squared.
        """
        along = own = step = 0.0
        for first in range(0, landed.size, PIECE):
            part = slice(first, first + PIECE)
            with np.errstate(over="ignore", invalid="ignore"):  # looked at below
                moved = landed[part] - guess.start[part]
                delta = guess.delta[part]
                along += float(np.dot(moved, delta))
                own += float(np.dot(delta, delta))
                step += float(np.dot(moved, moved))
        if not math.isfinite(own + step):
            return 1e9  # squares beyond float32: nothing to learn from a run that has blown up
        if own > 0.0:
            seen = min(max(along / own, 0.0), 1.0)
            weight = self._settings.smoothing
            before = self._alpha.get(guess.block)
            self._alpha[guess.block] = seen if before is None else weight * seen + (1.0 - weight) * before
        apart = math.sqrt(max(own - 2.0 * along + step, 0.0))
        return min(apart / math.sqrt(step), 1e9) if step > 0.0 else (0.0 if apart == 0.0 else 1e9)


def replacement(held: Vector, guess: Vector, landed: Vector) -> Vector:
    """The delta rule w ← w + (x' − guess), for a block that a later round has trained meanwhile.

    Only where there are fewer blocks than rounds in flight; otherwise x' itself replaces the guess, exactly.
    """
    return held + (landed - guess)
