"""Adaptive K: a client takes as many optimizer steps in a round as the exchange that the round hides lasts.

    K = ⌈M / (f s)⌉, within solver.min_steps and solver.max_steps

    M  seconds from the own delta ready to the new block held, for the block (the mean over the f blocks) on its way
    f  rounds in flight, each of which hides its share of M
    s  seconds a step of the block that is trained

M and s are medians of the newest observations, so that one slow round moves nothing. They are known per block, because
blocks differ in size and a step on the first layers goes back through all others. K stays as it is until M / (f s) has
left the range that K stands for by a margin: it does not flutter between two values. Half of the least margin takes no
step of its own when K is chosen, as a whole step of a slow client is what all others wait for. What a client that
trains more than others counts in the mean is the business of `round.weights`. Reads no clock: it is told seconds, so
that a run with adaptive K depends on time and cannot be repeated bit for bit.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parablock import sections

REMEMBERED = 5
"""Observations that a median is taken over: two odd ones among them change little."""

MARGIN_STEPS, MARGIN_SHARE = 0.25, 0.05
"""How far beyond its range M / (f s) must be for another K: below it as a share of K, above it at least in steps."""


class AdaptiveSteps:
    """The K of one client. Without `solver.adaptive` it is `solver.steps`, whatever is observed."""

    def __init__(self, settings: sections.Solver, in_flight: int) -> None:
        self._low, self._high = settings.step_bounds
        self._in_flight = in_flight
        self._newest = settings.steps
        self._chosen: dict[int, int] = {}  # by block
        self._step_s = _Medians()
        self._exchange_s = _Medians()

    def trained(self, block: int, steps: int, seconds: float) -> None:
        """A round of `steps` on the block took so long."""
        assert steps > 0
        assert seconds > 0
        self._step_s.note(block, seconds / steps)

    def exchanged(self, block: int, seconds: float) -> None:
        """An exchange of the block lasted so long. What a client waits for slower ones is no part of it."""
        assert seconds >= 0
        self._exchange_s.note(block, seconds)

    def next(self, block: int, hides: Sequence[int]) -> int:
        """The K of the round that begins now, on `block`, while those of `hides` are on their way.

        It is `solver.steps` until an exchange has been observed.
        """
        steps = self._chosen.get(block, self._newest)
        step_s = self._step_s.of(block)
        exchanges = [seconds for seconds in map(self._exchange_s.of, hides) if seconds is not None]
        if exchanges and step_s is not None:
            wanted = fmean(exchanges) / (self._in_flight * step_s)
            below, above = MARGIN_SHARE * steps, max(MARGIN_STEPS, MARGIN_SHARE * steps)
            if not steps - 1 - below < wanted <= steps + above:
                steps = max(math.ceil(min(wanted - MARGIN_STEPS / 2, self._high)), self._low)
        self._chosen[block] = self._newest = steps
        return steps


class _Medians:
    """Medians of the newest observations by block; for a block without any, that of all blocks together."""

    def __init__(self) -> None:
        self._all: deque[float] = deque(maxlen=REMEMBERED)
        self._by_block: dict[int, deque[float]] = {}

    def note(self, block: int, seconds: float) -> None:
        self._all.append(seconds)
        self._by_block.setdefault(block, deque(maxlen=REMEMBERED)).append(seconds)

    def of(self, block: int) -> float | None:
        observed = self._by_block.get(block, self._all)
        return median(observed) if observed else None
