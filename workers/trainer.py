"""What a worker does with its model: train a block, put a block in place, evaluate. Runs on the torch executor only.

Joins the block solver (how a block is trained), the flight (what stands for a block until its mean lands) and the
data. Knows no message and no socket.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from parablock.aggregation import gather
from parablock.correction import Corrector
from parablock.flight import Flight
from parablock.learning_rate import learning_rate
from parablock.schedule import Schedule
from parablock.solver import BlockSolver, Diverged
from workers.batches import round_batches
from workers.evaluation import Scores, evaluate

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from parablock.participant_events import Arrived
    from workers.setup import Setup


class Stopped(Exception):
    """Training was asked to end."""


@dataclass(frozen=True)
class Landed:
    """A block was put into the model. staleness: rounds begun without it since its own."""

    arrived: Arrived
    alpha: float
    drift: float
    staleness: int


@dataclass(frozen=True)
class Solved:
    """A round was trained. values: float32 bytes of the delta, or None with a `reason` where it diverged.

    weight: tokens trained on. loss: per token. began, ended: monotonic seconds.
    """

    round: int
    block: int
    values: memoryview | None
    weight: int
    loss: float
    reason: str
    began: float
    ended: float
    landed: list[Landed] = field(default_factory=list)  # in between, with land = "arrival"


class Trainer:
    """See the module. arrivals: blocks that wait to be put in place. on_step: told (round, step) after each step."""

    def __init__(
        self, setup: Setup, clients: int, arrivals: deque[Arrived], on_step: Callable[[int, int], None]
    ) -> None:
        config = setup.config
        self._setup = setup
        self._config = config
        self._schedule = Schedule.of(config, len(setup.manifest.blocks))
        self._solver = BlockSolver(setup.model, setup.manifest, config.solver, setup.device)
        self._flight = Flight(Corrector(config.pipeline, clients))
        self._arrivals = arrivals
        self._waiting: list[Arrived] = []
        self._on_step = on_step
        self._stop = threading.Event()

    def stop(self) -> None:
        """End `train` at its next step; from any thread."""
        self._stop.set()

    def train(self, round: int) -> Solved:
        """K steps on the round's block, which then holds its guess. Raises Stopped."""
        setup, config, block = self._setup, self._config, self._schedule.block(round)
        began = time.monotonic()
        batches = round_batches(setup.rows, config.seed, setup.name, round, config.solver)
        landed: list[Landed] = []

        def after_step(step: int) -> None:
            if self._stop.is_set():
                raise Stopped
            self._on_step(round, step + 1)
            if config.pipeline.land == "arrival" and config.mode == "parablock":
                landed.extend(self._land_meanwhile(round, block))

        rate = learning_rate(config.solver, round, config.rounds)
        try:
            trained = self._solver.train(block, batches, rate, after_step)
        except Diverged as error:
            return Solved(round, block, None, 0, 0.0, str(error), began, time.monotonic(), landed)
        if trained.tokens == 0:
            return Solved(round, block, None, 0, 0.0, "its rows have no answer tokens", began, time.monotonic(), landed)
        delta = trained.delta.numpy()
        guess = self._flight.depart(round, block, trained.start.numpy(), delta)
        self._solver.write(block, torch.from_numpy(guess))
        values = delta.data.cast("B")
        return Solved(round, block, values, trained.tokens, trained.loss, "", began, time.monotonic(), landed)

    def land(self, through: int, next_round: int) -> list[Landed]:
        """Put in place, in the order of rounds, every block that has arrived from a round up to `through`."""
        return [self._land(a, next_round - 1 - a.round) for a in self._take(lambda a: a.round <= through)]

    def revert(self, before: int) -> None:
        """Take back the guesses of rounds below `before`, of which the broker will not speak again."""
        for block, start in self._flight.revert(before).items():
            self._solver.write(block, torch.from_numpy(start))

    def evaluate(self) -> tuple[Scores, int]:
        """Scores over this worker's held-out rows, and how many rows there are."""
        setup = self._setup
        assert setup.held_out is not None

        def keep_going(_done: int, _of: int) -> None:
            if self._stop.is_set():
                raise Stopped

        scores = evaluate(setup.model, setup.tokenizer, setup.held_out, self._config.eval, setup.device, keep_going)
        return scores, len(setup.held_out)

    def _land_meanwhile(self, round: int, active: int) -> list[Landed]:
        """Between two steps: what has arrived, but nothing for the block that is being trained."""
        return [self._land(a, round - a.round) for a in self._take(lambda a: a.block != active)]

    def _take(self, wanted: Callable[[Arrived], bool]) -> list[Arrived]:
        """Arrivals that are `wanted`, in the order of rounds; the others wait here."""
        while self._arrivals:  # filled by the event loop's thread, emptied only by this one
            self._waiting.append(self._arrivals.popleft())
        taken = [arrived for arrived in self._waiting if wanted(arrived)]
        self._waiting = [arrived for arrived in self._waiting if not wanted(arrived)]
        return sorted(taken, key=lambda arrived: arrived.round)

    def _land(self, arrived: Arrived, staleness: int) -> Landed:
        block = self._setup.manifest.blocks[arrived.block]
        values = None if arrived.pieces is None else gather(arrived.pieces, block.numel)
        landing = self._flight.land(
            arrived.round,
            arrived.block,
            values,
            alone=arrived.contributors == 1 and arrived.counted,
            held=lambda: self._solver.read(arrived.block).numpy(),
        )
        if landing.value is not None:
            self._solver.write(arrived.block, torch.from_numpy(landing.value))
        return Landed(arrived, landing.alpha, landing.drift, max(staleness, 0))
