"""The rounds of one client that are on the way, and what is written into its model when they land.

Keeps the guesses (see `parablock.correction`) by round. Knows no model: it takes and returns flat vectors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.correction import Corrector, Guess, replacement

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Landing:
    """What a committed block does to the model. value: the block's new content, shape (numel,); None: nothing."""

    value: Vector | None
    alpha: float
    drift: float


class Flight:
    """The guesses that stand in the model. Not thread-safe: the torch executor owns it."""

    def __init__(self, corrector: Corrector) -> None:
        self._corrector = corrector
        self._guesses: dict[int, Guess] = {}
        self._newest: dict[int, int] = {}  # by block, the latest round of which a value has landed

    def depart(self, round: int, block: int, start: Vector, delta: Vector) -> Vector:
        """Note a round that was trained; returns what stands for the block until its mean lands."""
        guess = self._corrector.guess(block, start, delta)
        self._guesses[round] = guess
        return guess.value

    def land(
        self, round: int, block: int, landed: Vector | None, *, alone: bool, held: Callable[[], Vector]
    ) -> Landing:
        """Replace the guess of `round` by what the broker committed (None: the block stays as it was).

        alone: this client was the only contributor.
        held: reads the block's present content, only asked for where a later round has trained the same block.
        """
        if round < self._newest.get(block, -1):
            return Landing(None, 0.0, 0.0)  # overtaken by a later round of its block, which builds on it
        own = self._guesses.pop(round, None)
        if landed is None:
            if own is None:
                return Landing(None, 0.0, 0.0)
            landed, drift = own.start, 0.0
        else:
            self._newest[block] = round
            for number in self._of(block, before=round):
                del self._guesses[number]  # overtaken, or closed without us: what landed is newer
            drift = self._corrector.learn(own, landed, alone=alone) if own is not None else 0.0
        alpha = own.alpha if own is not None else 0.0
        later = self._of(block, after=round)
        if not later:
            return Landing(landed, alpha, drift)
        base = self._guesses[later[0]].start  # what stood for this round when the later one began
        value = replacement(held(), base, landed)
        self._shift(later, base, landed)
        return Landing(value, alpha, drift)

    def revert(self, before: int) -> dict[int, Vector]:
        """Give up the guesses of rounds below `before`, of which nothing will be heard; block → what it holds without.

        After a client has lost touch, between two rounds. Blocks of those rounds that were committed come as newer
        versions anyway.
        """
        given_up = [self._guesses.pop(n) for n in sorted(self._guesses, reverse=True) if n < before]
        values = {guess.block: guess.start for guess in given_up}  # the earliest one's start, as it comes last
        for block, start in values.items():
            later = self._of(block)
            if later:
                self._shift(later, self._guesses[later[0]].start, start)
                values[block] = self._guesses[later[-1]].value
        return values

    def _shift(self, rounds: list[int], base: Vector, landed: Vector) -> None:
        """Move guesses that were built on `base` to where they would stand on `landed`."""
        for number in rounds:
            guess = self._guesses[number]
            self._guesses[number] = dataclasses.replace(
                guess, start=replacement(guess.start, base, landed), value=replacement(guess.value, base, landed)
            )

    def _of(self, block: int, *, after: int = -1, before: int = 2**63) -> list[int]:
        """The rounds of `block` that are guessed, in order."""
        return sorted(n for n, guess in self._guesses.items() if guess.block == block and after < n < before)
