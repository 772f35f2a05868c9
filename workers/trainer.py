"""What a worker does with its model: train a block, put a block in place, evaluate. Runs on the torch executor only.

Joins the block solver (how a block is trained), the flight (what stands for a block until its mean lands) and the
data. Knows no message and no socket.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from parablock.correction import Corrector
from parablock.flight import Flight
from parablock.learning_rate import learning_rate
from parablock.solver import BlockSolver, Diverged
from workers.batches import step_batches
from workers.evaluation import evaluate
from workers.spill import Spillable
from workers.state_folder import LandedBlock

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Collection, Sequence

    import numpy as np
    import numpy.typing as npt

    from parablock.correction import Alpha
    from parablock.participant_events import Arrived
    from parablock.scores import Scores
    from parablock.staging import Incoming
    from parablock.tensor_file import Tensors
    from workers.inbox import Delivery
    from workers.keeper import Keeper
    from workers.setup import Setup
    from workers.state_folder import State, StateFolder

log = logging.getLogger("worker")


class Stopped(Exception):
    """Training was asked to end."""


@dataclass(frozen=True)
class Landed:
    """A block was put into the model. staleness: rounds begun without it since its own.

    alpha, drift, miss: as in `parablock.flight.Landing`.
    """

    arrived: Arrived
    alpha: float
    drift: float
    miss: float
    staleness: int


@dataclass(frozen=True)
class Solved:
    """A round was trained. values: the delta, on its way from the device; None with a `reason` where it diverged.
    start: what the block was before, likewise.

    weight: tokens trained on, in so many steps. loss: per token. began, ended: monotonic seconds. learnt: gives what
    the optimizer keeps of the block, where it keeps anything. alpha, built_on: see `workers.state_folder.Contribution`.
    """

    round: int
    block: int
    values: Spillable | None
    weight: int
    steps: int
    loss: float
    reason: str
    began: float
    ended: float
    landed: list[Landed] = field(default_factory=list)  # in between, with land = "arrival"
    alpha: Alpha = ()
    built_on: int | None = -1
    learnt: Callable[[], Tensors | None] | None = None
    start: Spillable | None = None


class Trainer:
    """See the module. arrivals: blocks that wait to be put in place. on_step: told (round, step) after each step.

    keeper: told of what lands.
    """

    def __init__(
        self,
        setup: Setup,
        clients: int,
        arrivals: deque[Delivery],
        on_step: Callable[[int, int], None],
        keeper: Keeper | None = None,
    ) -> None:
        config = setup.config
        self.clients = clients
        self._setup = setup
        self._config = config
        self._solver = BlockSolver(setup.model, setup.manifest, config.solver, setup.device, setup.staging)
        sampled = config.sampled(clients)
        self._corrector = Corrector(config.pipeline, clients, setup.manifest.starts, sampled)
        self._flight = Flight(self._corrector)
        self._arrivals = arrivals
        self._waiting: list[Delivery] = []
        self._versions: dict[int, int] = {}  # by block, the round whose block all clients hold; none: the base model's
        self.surplus = 0  # steps taken beyond `solver.steps` a round, or short of it
        self._on_step = on_step
        self._keeper = keeper
        self._stop = threading.Event()

    def stop(self) -> None:
        """End `train` at its next step; from any thread."""
        self._stop.set()

    def resume(self, state: State, folder: StateFolder) -> None:
        """Become what an earlier process was when it began with the round at `state.position`. folder: where the rest
        of the state is read from, a block at a time.

        A guess of a block that began with another guess (where there are fewer blocks than rounds in flight) does not
        stand again, nor one of a block that could not be read: their blocks are as they landed, or the base model's.
        """
        for block, landed in state.blocks.items():
            self._solver.write(block, torch.from_numpy(folder.block(block)))
            self._versions[block] = landed.round
            self._flight.landed(landed.round, block)
            self._corrector.restore(block, landed.alpha, alone=landed.alone)
        for round, spooled in sorted(state.contributions.items()):
            made = spooled.made
            if made.built_on != self._versions.get(made.block, -1) or self._flight.guessed(made.block):
                log.warning("round %d: what stood for its block until it lands is not restored", round)
                continue
            start = self._solver.read(made.block).numpy()
            value = self._flight.restore(round, made.block, start, spooled.delta, made.alpha)
            self._solver.write(made.block, torch.from_numpy(value))
        if state.position is not None:
            for block in state.optimizer:
                self._solver.restore(block, folder.optimizer(block, state.position.optimizer[block]))
            self.surplus = state.position.surplus

    def train(self, round: int, blocks: Sequence[int], steps: int) -> list[Solved]:
        """So many steps on the round's block, which then holds its guess; or on several blocks at once, those of the
        round and of the ones right after it. Raises Stopped."""
        setup, config = self._setup, self._config
        began = time.monotonic()
        # The rows go on where the last round left them; a round that is not trained here counts as solver.steps.
        first = round // config.together * config.solver.steps + self.surplus
        self.surplus += steps - config.solver.steps
        if self._keeper is not None:
            self._keeper.settle(blocks)
        batches = step_batches(setup.rows, config.seed, setup.name, first, steps, config.solver)
        landed: list[Landed] = []
        built_on = [None if self._flight.guessed(block) else self._versions.get(block, -1) for block in blocks]

        def after_step(step: int) -> None:
            if self._stop.is_set():
                raise Stopped
            self._on_step(round, step + 1)
            if config.pipeline.land == "arrival" and config.mode == "parablock":
                (active,) = blocks
                landed.extend(self._land_meanwhile(round, active))

        def told(
            place: int, values: Spillable | None, weight: int, loss: float, reason: str = "", alpha: Alpha = ()
        ) -> Solved:
            """The steps are in the first round's time; each later one's begins where that before it has ended."""
            nonlocal began
            span = began, time.monotonic()
            began = span[1]
            meanwhile = [] if place else landed
            keeps = config.solver.state == "keep"
            return Solved(
                round + place,
                blocks[place],
                values,
                weight,
                steps,
                loss,
                reason,
                *span,
                landed=meanwhile,
                alpha=alpha,
                built_on=built_on[place],
                learnt=partial(self._solver.learnt, blocks[place]) if keeps else None,
            )

        rate = learning_rate(config.solver, round, config.rounds)
        try:
            trained = self._solver.train_together(blocks, batches, rate, after_step)
        except Diverged as error:
            return [told(place, None, 0, 0.0, str(error)) for place in range(len(blocks))]
        if trained[0].tokens == 0:
            return [told(place, None, 0, 0.0, "its rows have no answer tokens") for place in range(len(blocks))]
        solved = []
        for place, (block, made) in enumerate(zip(blocks, trained, strict=True)):
            start, delta = (Spillable(setup.staging.out(values)) for values in (made.start, made.delta))
            alpha = self._flight.depart(round + place, block, start, delta)
            self._solver.write_guess(block, made, alpha)
            solved.append(replace(told(place, delta, made.tokens, made.loss, alpha=alpha), start=start))
        return solved

    def sit_out(self) -> None:
        """A round is trained by others only: the rows that it would have taken are those of the next."""
        self.surplus -= self._config.solver.steps

    def land(self, through: int, next_round: int) -> list[Landed]:
        """Put in place, in the order of rounds, every block that has arrived from a round up to `through`."""
        taken, together = self._take(lambda arrived: arrived.round <= through), self._config.together
        return [
            self._land(delivery, next_round, (next_round - 1) // together - delivery.arrived.round // together)
            for delivery in taken
        ]

    def revert(self, before: int, pending: Collection[int]) -> None:
        """Take back the guesses of rounds below `before`, of which the broker will not speak again, but of those that
        are `pending` or here."""
        self._take(lambda _: False)
        heard = {*pending, *(delivery.arrived.round for delivery in self._waiting)}
        unheard = {round for round in self._flight.rounds if round < before and round not in heard}
        for block, start in self._flight.revert(unheard).items():
            self._solver.write(block, torch.from_numpy(start))
        if self._keeper is not None:
            self._keeper.closed(before, heard)

    def evaluate(self) -> dict[str, Scores]:
        """Scores over this worker's held-out rows by task. Only `#### N` rows are answered, as the record of a run
        knows no other grade."""
        setup = self._setup
        assert setup.held_out is not None

        def keep_going(_done: int, _of: int) -> None:
            if self._stop.is_set():
                raise Stopped

        return evaluate(setup.model, setup.tokenizer, setup.held_out, self._config.eval, setup.device, keep_going)

    def _land_meanwhile(self, round: int, active: int) -> list[Landed]:
        """Between two steps: what has arrived, but nothing for the block that is being trained."""
        taken = self._take(lambda arrived: arrived.block != active)
        return [self._land(delivery, round, round - delivery.arrived.round) for delivery in taken]

    def _take(self, wanted: Callable[[Arrived], bool]) -> list[Delivery]:
        """Deliveries that are `wanted`, in the order of rounds; the others wait here."""
        while self._arrivals:  # filled by the event loop's thread, emptied only by this one
            self._waiting.append(self._arrivals.popleft())
        taken = [delivery for delivery in self._waiting if wanted(delivery.arrived)]
        self._waiting = [delivery for delivery in self._waiting if not wanted(delivery.arrived)]
        return sorted(taken, key=lambda delivery: delivery.arrived.round)

    def _land(self, delivery: Delivery, next_round: int, staleness: int) -> Landed:
        arrived, staging = delivery.arrived, self._setup.staging
        incoming = None if delivery.values is None else delivery.values.result()
        landed = self._landed(delivery, incoming)
        if self._flight.block_of(arrived.round) not in (None, arrived.block):
            # The broker has spent the round on the repair of another block (`broker.opening`): ours came to nothing.
            for block, start in self._flight.revert([arrived.round]).items():
                self._solver.write(block, torch.from_numpy(start))
        landing = self._flight.land(
            arrived.round,
            arrived.block,
            landed,
            alone=arrived.contributors == int(arrived.counted),
            held=lambda: self._solver.read(arrived.block).numpy(),
        )
        if landing.value is not None:
            same = incoming is not None and landing.value is incoming.values
            arriving = incoming if same and incoming is not None else staging.bring(landing.value)
            self._solver.write(arrived.block, arriving.ready())
        released: Callable[[], None] | None = None
        if incoming is not None and self._flight.public(arrived.block) is None:
            released = partial(staging.release, incoming)  # nothing but the model holds the block now
        self._keep(arrived, landed, landing.miss, next_round, released)
        return Landed(arrived, landing.alpha, landing.drift, landing.miss, max(staleness, 0))

    def _keep(
        self,
        arrived: Arrived,
        landed: npt.NDArray[np.float32] | None,
        miss: float,
        next_round: int,
        released: Callable[[], None] | None,
    ) -> None:
        """Have it kept on disk. released: called when its memory is free again."""
        block = arrived.block
        if self._keeper is not None and landed is not None and self._versions[block] == arrived.round:
            learnt, alone = self._corrector.learnt(block), self._corrector.alone
            told = LandedBlock(block, arrived.round, learnt, alone, next_round, miss)
            self._keeper.landed(told, landed, released)
            return
        if self._keeper is not None:
            self._keeper.dropped(arrived.round)
        if released is not None:
            released()

    def _landed(self, delivery: Delivery, incoming: Incoming | None) -> npt.NDArray[np.float32] | None:
        """What every client holds of the block from now on, bit for bit; None: what it held before.

        A change is added just as the broker has added it.
        """
        arrived, block = delivery.arrived, delivery.arrived.block
        if incoming is None:
            return None
        values = incoming.values
        held = self._versions.get(block, -1)
        if delivery.change and held < arrived.round:
            assert held == arrived.base, f"a change of round {arrived.base}'s block {block}, which is round {held}'s"
            public = self._flight.public(block)
            values = (self._solver.read(block).numpy() if public is None else public[:]) + values
        self._versions[block] = max(held, arrived.round)
        return values
