"""The block correction: what stands for a block while its mean is on the way, and how the mean replaces it.

When a client has finished round t on block b it holds x, the value from which it started, and its own Δ_i. Until
the broker's x' arrives, the model holds the guess x + α Δ_i. Because the next rounds train other blocks, replacing
the guess by x' is exact for block b; what remains is the effect of one round of staleness on the other blocks.

    own     α = 1: the client's own update. It holds client noise that the mean does not.
    stale   α = 0: the old value, the naive delay.
    shrink  α learnt per tensor of the block from its last visits: the least-squares share ⟨x' − x, Δ_i⟩ / ⟨Δ_i, Δ_i⟩,
            smoothed; 1/√n before the first observation, n being how many clients train in a round. How much of a
            client's update is noise differs by tensor. Never more than 1, also where a server's momentum, or other
            clients' longer rounds, move the block farther than that.

Where there are so few blocks that a later round trains b before x' has landed, the delta rule keeps what that round
added (`replacement`). With a single client the mean is its own update, so α is exactly 1 under `shrink`.
It is single as long as no block has landed that others have contributed to; that it was drawn by itself, or in time by
itself, for the rounds that it has trained does not make it single.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from parablock.aggregation import PIECE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parablock.sections import Pipeline

    Vector = npt.NDArray[np.float32]

Alpha = tuple[float, ...]
"""By tensor of a block, in order, the share of the own update that a guess keeps."""

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


class Values(Protocol):
    """A vector, or what is read as one part by part: float32 of shape (size,), which nobody changes."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Vector: ...


@dataclass(frozen=True)
class Guess:
    """One round that is on the way: block, starting value x and own delta, of shape (numel,).

    parts: the block's tensors. alpha: which share of the delta is kept, of each.
    """

    block: int
    start: Values
    delta: Values
    parts: tuple[slice, ...]
    alpha: Alpha

    @property
    def value(self) -> Vector:
        """x + α Δ_i, rounded as the broker rounds x + Δ̄. Made when asked for: it is another copy of the block."""
        value = np.array(self.start[:])
        for part, alpha in zip(self.parts, self.alpha, strict=True):
            value[part] += np.float32(alpha) * self.delta[part]
        return value

    @property
    def share(self) -> float:
        """α, mean over the block's elements."""
        size = self.delta.size
        kept = sum(alpha * len(range(size)[part]) for part, alpha in zip(self.parts, self.alpha, strict=True))
        return kept / size


class Corrector:
    """Makes the guesses of one client and learns its α.

    clients: how many there are. starts: by block, where each of its tensors begins. sampled: how many clients train in
    a round, if that is not all.
    """

    def __init__(
        self, settings: Pipeline, clients: int, starts: Sequence[Sequence[int]], sampled: int | None = None
    ) -> None:
        sampled = clients if sampled is None else sampled
        assert 1 <= sampled <= clients
        assert all(of and of[0] == 0 for of in starts)
        self._settings = settings
        self._alone = clients == 1
        self._first = 1.0 / math.sqrt(sampled)
        self._parts = [tuple(slice(*ends) for ends in pairwise([*of, None])) for of in starts]
        self._learnt: dict[int, tuple[float | None, ...]] = {}  # by block and tensor; None: not yet

    def alpha(self, block: int) -> Alpha:
        """By tensor of the block."""
        unlearnt = self._unlearnt
        if self._alone:
            return (unlearnt,) * len(self._parts[block])
        return tuple(unlearnt if alpha is None else alpha for alpha in self._of(block))

    def _of(self, block: int) -> tuple[float | None, ...]:
        return self._learnt.get(block) or (None,) * len(self._parts[block])

    @property
    def _unlearnt(self) -> float:
        match self._settings.correction:
            case "own":
                return 1.0
            case "stale":
                return 0.0
            case "shrink":
                return 1.0 if self._alone else self._first
        raise AssertionError(f"no such correction: {self._settings.correction}")

    def guess(self, block: int, start: Values, delta: Values, alpha: Alpha | None = None) -> Guess:
        """alpha: if not that which holds now."""
        return Guess(block, start, delta, self._parts[block], self.alpha(block) if alpha is None else alpha)

    def learnt(self, block: int) -> tuple[float | None, ...] | None:
        """What was learnt of the block, by tensor; None: nothing. With it another corrector goes on (`restore`)."""
        return self._learnt.get(block)

    @property
    def alone(self) -> bool:
        """Whether this client is taken to be single."""
        return self._alone

    def restore(self, block: int, learnt: tuple[float | None, ...] | None, *, alone: bool) -> None:
        if learnt is not None:
            self._learnt[block] = learnt
        self._alone = self._alone and alone

    def joined(self) -> None:
        """Others have contributed to a block, to which we did as well or did not: this client is not single."""
        self._alone = False

    def learn(self, guess: Guess, landed: Vector) -> Observation:
        """Take one observation of the block's α from what landed.

        step = x' − x is what the broker did to the block, so that a server optimizer's share is learnt as well.
        """
        moments = [_moments(guess, landed, part) for part in guess.parts]
        if not all(math.isfinite(each.own + each.step) for each in moments):
            return Observation(_FAR, _FAR)  # squares beyond float32: nothing to learn from a run that has blown up
        if self._settings.correction == "shrink":
            self._learnt[guess.block] = tuple(map(self._smoothed, moments, self._of(guess.block)))
        step = sum(each.step for each in moments)

        def off(alpha: Alpha) -> float:
            apart = math.sqrt(max(sum(each.apart(share) for each, share in zip(moments, alpha, strict=True)), 0.0))
            return min(apart / math.sqrt(step), _FAR) if step > 0.0 else (0.0 if apart == 0.0 else _FAR)

        return Observation(off((1.0,) * len(moments)), off(guess.alpha))

    def _smoothed(self, seen: _Moments, before: float | None) -> float | None:
        """The new α of one tensor. From an update of nothing nothing is learnt."""
        if seen.own == 0.0:
            return before
        share = min(max(seen.along / seen.own, 0.0), 1.0)
        weight = self._settings.smoothing
        return share if before is None else weight * share + (1.0 - weight) * before


@dataclass(frozen=True)
class _Moments:
    """Of one tensor: ⟨x' − x, Δ_i⟩, ⟨Δ_i, Δ_i⟩ and ⟨x' − x, x' − x⟩."""

    along: float
    own: float
    step: float

    def apart(self, share: float) -> float:
        """‖share · Δ_i − (x' − x)‖², which rounding may make less than 0."""
        return share * share * self.own - 2.0 * share * self.along + self.step


def _moments(guess: Guess, landed: Vector, tensor: slice) -> _Moments:
    along = own = step = 0.0
    first, end, _ = tensor.indices(landed.size)
    for begin in range(first, end, PIECE):
        part = slice(begin, min(begin + PIECE, end))
        with np.errstate(over="ignore", invalid="ignore"):  # looked at by the caller
            moved = landed[part] - guess.start[part]
            delta = guess.delta[part]
            along += float(np.dot(moved, delta))
            own += float(np.dot(delta, delta))
            step += float(np.dot(moved, moved))
    return _Moments(along, own, step)


def replacement(held: Vector, guess: Vector, landed: Vector) -> Vector:
    """The delta rule w ← w + (x' − guess), for a block that a later round has trained meanwhile.

    Only where there are fewer blocks than rounds in flight; otherwise x' itself replaces the guess, exactly.
    """
    return held + (landed - guess)
