"""Which block comes next where blocks that move more come more often.

    importance_b   rms(x' − x) / lr  of the block's last visit that was counted
    each round     credit_b += √importance_b / Σ √importance;  the block with the most credit comes, and pays 1

So blocks come in proportion to √importance, spread evenly (smooth weighted round robin). To take the block that
promises most is Gauss-Southwell's rule (Nutini et al., arXiv 1506.00552 and, for blocks, 1712.08859); BlockLLM (Ramesh
et al., arXiv 2406.17296) weighs a block's gradient against how often it was visited, as the credit does. The root is
that of accelerated coordinate descent, where a coordinate's share goes by the root of its smoothness (Allen-Zhu et al.,
arXiv 1512.09103). By importance itself the last block had so many rounds that the others fell behind (README,
Decisions).

The root mean square over a block's elements, not the norm, because a norm would call large blocks important. Not
relative to the block's own norm, because a step of AdamW moves an element by about lr whatever the element's size: what
differs between blocks is how far steps and clients agree on the direction, and that shows in the mean's root mean
square. Per lr, because otherwise a falling rate would make those blocks important that were seen longest ago.

Three bounds hold whatever the importances are (B blocks, f rounds in flight):

    the first B rounds train every block once, last block first;
    any f + 1 consecutive rounds train different blocks, if B > f;
    a block waits no longer than 2 B rounds from one visit to the next.

The third one holds because a block is passed over only if all that have waited longer can still be in time, one a
round, after it. The one that has waited longest is always such a block, and never one that is in flight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from parablock.schedule import gap_holds

if TYPE_CHECKING:
    from collections.abc import Mapping

SWEEPS = 2
"""The longest gap between two visits of a block is this times the number of blocks."""

CREDIT = 1.0
"""Credit and debt stay within this, so that what a block was not given, or given too often, is soon forgotten."""

_DIGITS = 9
_LARGEST = 1e30
"""Of a run that has blown up, whose moves cannot be squared: their sum shall be a number."""


class ImportanceOrder:
    """Told of moves as they are committed; asked for one round after the other, each once."""

    def __init__(self, num_blocks: int, in_flight: int) -> None:
        self._longest_gap = SWEEPS * num_blocks
        self._gap = in_flight if gap_holds(num_blocks, in_flight) else 0
        self._importance: dict[int, float] = {}  # by block that was visited to any use
        self._credit = dict.fromkeys(range(num_blocks), 0.0)
        self._last = {block: -1 - block for block in range(num_blocks)}  # by block: the round of its last visit
        self._round = 0  # the next to be decided

    def moved(self, block: int, importance: float) -> None:
        """A visit of the block was counted. importance: rms(x' − x) / lr, at least 0."""
        self._importance[block] = min(importance, _LARGEST)

    def next(self) -> int:
        """The block of the next round."""
        waited = sorted(self._last, key=lambda block: self._last[block])  # the longest first
        candidates = []
        for place, block in enumerate(waited):
            candidates.append(block)
            if self._round + 1 + place > self._last[block] + self._longest_gap:
                break  # it must come now, or after those before it; nothing else may come first
        if self._round < len(waited):
            candidates = waited[:1]  # the first sweep
        free = [block for block in candidates if self._round - self._last[block] > self._gap]  # never none
        self._earn()
        # Of those whose credits differ by rounding alone the one that has waited longest.
        chosen = max(free, key=lambda block: round(self._credit[block], _DIGITS))
        self._credit[chosen] = max(self._credit[chosen] - 1.0, -CREDIT)
        self._last[chosen] = self._round
        self._round += 1
        return chosen

    def snapshot(self) -> dict[str, Any]:
        """All that the next rounds depend on, as JSON has it: floats go through it unchanged."""
        blocks = range(len(self._credit))
        return {
            "round": self._round,
            "importance": [self._importance.get(block) for block in blocks],
            "credit": [self._credit[block] for block in blocks],
            "last": [self._last[block] for block in blocks],
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on as the one of which this is the snapshot, of as many blocks."""
        assert len(snapshot["credit"]) == len(self._credit), "a snapshot of another number of blocks"
        self._round = snapshot["round"]
        visited = enumerate(snapshot["importance"])
        self._importance = {block: importance for block, importance in visited if importance is not None}
        self._credit = dict(enumerate(snapshot["credit"]))
        self._last = dict(enumerate(snapshot["last"]))

    def _earn(self) -> None:
        unknown = max(self._importance.values(), default=1.0)  # of a block none of whose visits was counted yet
        roots = {block: math.sqrt(self._importance.get(block, unknown)) for block in self._credit}
        total = sum(roots.values())
        for block, root in roots.items():
            share = root / total if total > 0.0 else 1.0 / len(roots)
            self._credit[block] = min(self._credit[block] + share, CREDIT)
