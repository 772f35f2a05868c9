"""What K steps of a block cost on this machine: the solver's own rounds on real batches, with a watch beside it.

Timed is what stands between two rounds of a worker: its batches, the steps, the delta, the guess put in place. Trains
a model that nobody keeps. Which blocks are worth measuring is `parablock.plan`'s business.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from parablock.learning_rate import learning_rate
from parablock.plan import Cost
from parablock.solver import BlockSolver
from workers.batches import step_batches

if TYPE_CHECKING:
    from workers.setup import Setup

_FEWEST_STEPS, _MOST_STEPS = 2, 8
_BLOCK_S = 3.0
_FEWEST_TURNS, _MOST_TURNS = 3, 8
_SLOW_S, _SLOW_STEP_S = 10.0, 2.0
"""A block that takes as long as this is timed once, and of steps like this few: their noise is small beside them."""


class BlockTimer:
    """Times the blocks of a model that was set up as for a run, and is spent afterwards."""

    def __init__(self, setup: Setup, steps: int) -> None:
        """steps: K. Fewer than 2 cannot tell a step from what a round costs besides, more than 8 add nothing."""
        self._setup = setup
        self._steps = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
        self._solver = BlockSolver(setup.model, setup.manifest, setup.config.solver, setup.device)
        self._round = 0

    def warm_up(self, block: int) -> None:
        """The first round of a process is slower than all others. Raises Diverged."""
        steps, self._steps = self._steps, _FEWEST_STEPS
        _, step_s = self._turn(block)
        if step_s < _SLOW_STEP_S:
            self._steps = steps

    def cost(self, block: int) -> Cost:
        """The block's cost, of medians over some rounds. Raises Diverged."""
        began, totals, steps = time.monotonic(), [], []
        while True:
            total, step = self._turn(block)
            totals.append(total)
            steps.append(step)
            spent = time.monotonic() - began
            enough = len(totals) >= _FEWEST_TURNS and spent >= _BLOCK_S
            if enough or len(totals) >= _MOST_TURNS or spent >= _SLOW_S:
                break
        step_s = statistics.median(steps)
        return Cost(max(statistics.median(totals) - self._steps * step_s, 0.0), step_s)

    def _turn(self, block: int) -> tuple[float, float]:
        """Seconds of one round, and of one of its steps."""
        setup, config = self._setup, self._setup.config
        marks: list[float] = []

        def mark(_step: int) -> None:
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
            marks.append(time.perf_counter())

        began = time.perf_counter()
        first = self._round * self._steps
        batches = step_batches(setup.rows, config.seed, setup.name, first, self._steps, config.solver)
        trained = self._solver.train(block, batches, learning_rate(config.solver, 0, config.rounds), mark)
        self._solver.write(block, trained.start + trained.delta)
        ended = time.perf_counter()
        self._round += 1
        return ended - began, (marks[-1] - marks[0]) / (len(marks) - 1)
