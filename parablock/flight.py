"""The rounds of one client that are on the way, and what is written into its model when they land.

Keeps the guesses (see `parablock.correction`) by round. Knows no model: it takes and returns flat vectors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.correction import Guess, Observation, replacement

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy as np
    import numpy.typing as npt

    from parablock.correction import Alpha, Corrector, Values

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Landing:
    """What a committed block does to the model. value: the block's new content, shape (numel,); None: nothing.

    alpha: mean over the block's elements. drift, miss: see `parablock.correction.Observation`. All three are 0 where
    there was no guess.
    """

    value: Vector | None
    alpha: float
    drift: float
    miss: float


_EXACT = Observation(0.0, 0.0)
_NOTHING = Landing(None, 0.0, 0.0, 0.0)


class Flight:
    """The guesses that stand in the model. Not thread-safe: the torch executor owns it."""

    def __init__(self, corrector: Corrector) -> None:
        self._corrector = corrector
        self._guesses: dict[int, Guess] = {}
        self._newest: dict[int, int] = {}  # by block, the latest round of which a value has landed
        self._public: dict[int, Values] = {}  # by guessed block, what all clients hold of it: the newest that landed

    def depart(self, round: int, block: int, start: Values, delta: Values) -> Alpha:
        """Note a round that was trained; returns α by tensor: x + α Δ stands for the block until its mean lands.

        start, delta: x and Δ. Neither is read before next something lands or is given up, since they may be on their
        way from the device until then, and read part by part where that will do, since they may be on disk by then.
        """
        guess = self._guesses[round] = self._corrector.guess(block, start, delta)
        self._public.setdefault(block, start)
        return guess.alpha

    def restore(self, round: int, block: int, start: Vector, delta: Values, alpha: Alpha) -> Vector:
        """Note a round that an earlier process of this client has trained; returns what stands for the block."""
        guess = self._guesses[round] = self._corrector.guess(block, start, delta, alpha)
        self._public.setdefault(block, start)
        return guess.value

    def landed(self, round: int, block: int) -> None:
        """The block is as that round has made it: an earlier process has put it in place."""
        self._newest[block] = round

    @property
    def rounds(self) -> set[int]:
        """Those that are guessed."""
        return set(self._guesses)

    def guessed(self, block: int) -> bool:
        """Whether the model holds a guess of the block. Waits for nothing."""
        return bool(self._of(block))

    def public(self, block: int) -> Values | None:
        """What all clients hold of a block that is guessed here; None where the model holds just that."""
        return self._public.get(block)

    def land(
        self, round: int, block: int, landed: Vector | None, *, alone: bool, held: Callable[[], Vector]
    ) -> Landing:
        """Replace the guess of `round` by what the broker committed (None: the block stays as it was).

        alone: nobody else has contributed.
        held: reads the block's present content, only asked for where a later round has trained the same block.
        """
        if not alone:
            self._corrector.joined()
        if round < self._newest.get(block, -1):
            return _NOTHING  # overtaken by a later round of its block, which builds on it
        own = self._guesses.pop(round, None)
        if landed is None:
            if own is None:
                return _NOTHING
            landed, seen = own.start[:], _EXACT
        else:
            self._newest[block] = round
            self._public[block] = landed
            for number in self._of(block, before=round):
                del self._guesses[number]  # overtaken, or closed without us: what landed is newer
            seen = self._corrector.learn(own, landed) if own is not None else _EXACT
        alpha = own.share if own is not None else 0.0
        later = self._of(block, after=round)
        if not later:
            if not self._of(block):
                self._public.pop(block, None)
            return Landing(landed, alpha, seen.drift, seen.miss)
        base = self._guesses[later[0]].start[:]  # what stood for this round when the later one began
        value = replacement(held(), base, landed)
        self._shift(later, base, landed)
        return Landing(value, alpha, seen.drift, seen.miss)

    def block_of(self, round: int) -> int | None:
        """The block that is guessed of a round; None: none is."""
        guess = self._guesses.get(round)
        return None if guess is None else guess.block

    def revert(self, rounds: Collection[int]) -> dict[int, Vector]:
        """Give up the guesses of rounds of which nothing will be heard; block → what it holds without.

        After a client has lost touch, between two rounds. Blocks of those rounds that were committed come as newer
        versions anyway.
        """
        values = {}
        for number in sorted(self._guesses.keys() & set(rounds), reverse=True):
            guess = self._guesses.pop(number)
            start = values[guess.block] = guess.start[:]
            later = self._of(guess.block, after=number)
            if later:
                self._shift(later, self._guesses[later[0]].start[:], start)
                values[guess.block] = self._guesses[later[-1]].value
            elif not self._of(guess.block):
                self._public.pop(guess.block, None)
        return values

    def _shift(self, rounds: list[int], base: Vector, landed: Vector) -> None:
        """Move guesses that were built on `base` to where they would stand on `landed`."""
        for number in rounds:
            guess = self._guesses[number]
            self._guesses[number] = dataclasses.replace(guess, start=replacement(guess.start[:], base, landed))

    def _of(self, block: int, *, after: int = -1, before: int = 2**63) -> list[int]:
        """The rounds of `block` that are guessed, in order."""
        return sorted(n for n, guess in self._guesses.items() if guess.block == block and after < n < before)
