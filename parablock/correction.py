"""The block correction: what stands for a block while its mean is on the way, and how the mean replaces it.

When a client has finished round t on block b it holds x, the value from which it started, and its own Δ_i. Until
the broker's x' arrives, the model holds the guess x + α Δ_i. Because the next rounds train other blocks, replacing
the guess by x' is exact for block b; what remains is the effect of one round of staleness on the other blocks.

    own     α = 1: the client's own update. It holds client noise that the mean does not.
    stale   α = 0: the old value, the naive delay.
    shrink  α learnt per block from the last visits: the least-squares share ⟨x' − x, Δ_i⟩ / ⟨Δ_i, Δ_i⟩, smoothed;
            1/√N before the first observation.

Where there are so few blocks that a later round trains b before x' has landed, the delta rule keeps what that round
added (`replacement`). With a single client the mean is its own update, so α is exactly 1 under `shrink`.
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

_FAR = 1e9
"""What is told where something is off by more, or by an unknown multiple."""


@dataclass(frozen=True)
class Observation:
    """How far off one client was, measured in lengths of what the broker did to the block, ‖x' − x‖.

    drift: its own update, ‖Δ_i − (x' − x)‖. miss: its guess, ‖α Δ_i − (x' − x)‖; 1 is what no guess (α = 0) misses by.
    Each is 0 where there is nothing to be off from, and 1e9 at most, also where squares are beyond float32.
    """

    drift: float
    miss: float


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
    """Makes the guesses of one client and learns its α per block."""

    def __init__(self, settings: Pipeline, clients: int) -> None:
        assert clients >= 1
        self._settings = settings
        self._alone = clients == 1
        self._first = 1.0 / math.sqrt(clients)
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

    def learn(self, guess: Guess, landed: Vector, *, alone: bool) -> Observation:
        """Take one observation of the block's α from what landed.

        alone: the commit named this client as its only contributor; when it does not, the client is not single.
        step = x' − x is what the broker did to the block, so that a server optimizer's share is learnt as well.
        """
        self._alone = self._alone and alone
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
            return Observation(_FAR, _FAR)  # squares beyond float32: nothing to learn from a run that has blown up
        if own > 0.0:
            seen = min(max(along / own, 0.0), 1.0)
            weight = self._settings.smoothing
            before = self._alpha.get(guess.block)
            self._alpha[guess.block] = seen if before is None else weight * seen + (1.0 - weight) * before

        def off(share: float) -> float:
            apart = math.sqrt(max(share * share * own - 2.0 * share * along + step, 0.0))
            return min(apart / math.sqrt(step), _FAR) if step > 0.0 else (0.0 if apart == 0.0 else _FAR)

        return Observation(off(1.0), off(guess.alpha))


def replacement(held: Vector, guess: Vector, landed: Vector) -> Vector:
    """The delta rule w ← w + (x' − guess), for a block that a later round has trained meanwhile.

    Only where there are fewer blocks than rounds in flight; otherwise x' itself replaces the guess, exactly.
    """
    return held + (landed - guess)
