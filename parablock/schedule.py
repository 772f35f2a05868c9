"""Which block is trained in which round, where that is a pure function of order, seed and round.

With f rounds in flight, any f + 1 consecutive rounds train different blocks, also across the border of two sweeps,
so that a block never lands while it is being trained. Where there are too few blocks for that (`gap_holds` is
false) the correction falls back to the delta rule; see `parablock.correction`.

Order `lisa` knows no sweeps: even rounds train block 0, each odd one any of the others, drawn anew each time (Pan et
al., arXiv 2403.17919). A client trains such a pair of rounds at once.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parablock.config import Config


def gap_holds(num_blocks: int, in_flight: int) -> bool:
    """Whether any in_flight + 1 consecutive rounds can train different blocks."""
    return num_blocks > in_flight


class Schedule:
    """The sequence of blocks. A sweep is `num_blocks` rounds in which each block comes exactly once."""

    def __init__(self, order: str, num_blocks: int, in_flight: int, seed: int) -> None:
        assert num_blocks >= 1
        assert in_flight >= 0
        self.num_blocks = num_blocks
        self._order = order
        self._gap = in_flight if gap_holds(num_blocks, in_flight) else 0
        self._seed = seed
        self._sweeps: list[list[int]] = []

    @classmethod
    def of(cls, config: Config, num_blocks: int) -> Schedule | None:
        """None where the order depends on how the run goes; see `parablock.importance`."""
        order = "lisa" if config.mode == "lisa" else config.schedule.order
        return cls(order, num_blocks, config.in_flight, config.seed) if order != "importance" else None

    def block(self, round: int) -> int:
        """The index of the block that round `round` (from 0) trains."""
        sweep, position = divmod(round, self.num_blocks)
        match self._order:
            case "cyclic":
                return position
            case "descending":
                return self.num_blocks - 1 - position
            case "random":
                while len(self._sweeps) <= sweep:
                    self._sweeps.append(self._draw(len(self._sweeps)))
                return self._sweeps[sweep][position]
            case "lisa":
                drawn = random.Random(f"parablock/lisa/{self._seed}/{round}").randrange(1, self.num_blocks)
                return drawn if round % 2 else 0
        raise AssertionError(f"no such order: {self._order}")

    def _draw(self, sweep: int) -> list[int]:
        """A permutation whose first blocks keep their distance from the last ones of the sweep before.

        Position p may not repeat any of the last (gap - p) blocks. There is always a choice: of the B - p blocks
        that are left, at most gap - p are barred, and B > gap.
        """
        rng = random.Random(f"parablock/schedule/{self._seed}/{sweep}")
        before = self._sweeps[-1] if self._sweeps else []
        left = list(range(self.num_blocks))
        drawn: list[int] = []
        for position in range(self.num_blocks):
            reach = self._gap - position
            barred = set(before[-reach:]) if reach > 0 else set()
            choice = rng.choice([block for block in left if block not in barred])
            left.remove(choice)
            drawn.append(choice)
        return drawn
