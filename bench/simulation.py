"""A run in one process: the clients one after the other, and nothing between them and the mean.

What a client does is `workers.trainer`'s, what the broker does `parablock.aggregation`'s, and when blocks land is that
of `land = "boundary"`, so that blocks and losses are those of a run of real processes, bit for bit, with as many torch
threads. No link, no clock, no protocol: it costs what the training costs, and on many cores many go on at once.
"""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from parablock import config, models, robust
from parablock.aggregation import server_move, unfit
from parablock.blocks import read_block, write_block
from parablock.measurement import judge, products
from parablock.participant_events import Arrived
from parablock.schedule import Schedule
from parablock.scores import total
from workers.inbox import Delivery
from workers.setup import Local, prepare
from workers.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from parablock.config import Config
    from parablock.scores import Scores
    from parablock.staging import Incoming
    from workers.trainer import Solved

    Vector = npt.NDArray[np.float32]
    Forge = Callable[[int, dict[int, Vector]], dict[int, Vector]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. loss: held-out, nats per token, all clients' rows. miss: mean over rounds and clients.

    synchronous: rounds of a client that were not trained upon a guess because the guard (`pipeline.max_miss`) said so.
    """

    loss: float
    miss: float
    synchronous: int


class Simulation:
    """The clients of a run, and what they have in common. Raises ValueError as `check` does.

    steps: of each client in every round, as adaptive K might choose them; None: `solver.steps` of all. forge: makes of
    a round and its deltas, by number of the client, what is sent; None: just those. disturbance: by how much of
    themselves the values that training begins with are off, at one standard deviation (normal, seeded).
    """

    def __init__(
        self,
        settings: Config,
        steps: Sequence[int] | None = None,
        forge: Forge | None = None,
        disturbance: float = 0.0,
    ) -> None:
        check(settings)
        self._settings = settings
        self._forge = forge or (lambda _round, deltas: deltas)
        steps = steps or [settings.solver.steps] * settings.round.clients
        self.clients = [Client(settings, index, taken) for index, taken in enumerate(steps)]
        manifest, model = self.clients[0].setup.manifest, self.clients[0].setup.model
        self.blocks: list[Vector] = [read_block(model, block).numpy() for block in manifest.blocks]
        if disturbance:
            self._disturb(disturbance)
        self._versions = [-1] * len(self.blocks)
        self._server: dict[int, dict[str, Vector]] = {}
        schedule = Schedule.of(settings, len(self.blocks))
        assert schedule is not None, "checked above"
        self._schedule = schedule

    def run(self) -> Outcome:
        together = self._settings.together
        for first in range(0, self._settings.rounds, together):
            blocks = [self._schedule.block(round) for round in range(first, first + together)]
            made = zip(*(client.train(first, blocks) for client in self.clients), strict=True)
            for round, (block, solved) in enumerate(zip(blocks, made, strict=True), start=first):
                self._commit(round, block, solved)
        for client in self.clients:
            client.land(self._settings.rounds, 0)
        scores = total(client.evaluate() for client in self.clients)
        misses = [miss for client in self.clients for miss in client.misses]
        return Outcome(scores.loss, sum(misses) / len(misses), sum(client.synchronous for client in self.clients))

    def _disturb(self, size: float) -> None:
        """All clients begin with other values, the same ones."""
        numbers = np.random.default_rng(self._settings.seed)
        for number, block in enumerate(self.clients[0].setup.manifest.blocks):
            factors = 1.0 + size * numbers.standard_normal(block.numel)
            self.blocks[number] = values = self.blocks[number] * factors.astype(np.float32)
            for client in self.clients:
                write_block(client.setup.model, block, torch.from_numpy(values))

    def _commit(self, round: int, block: int, solved: Sequence[Solved]) -> None:
        deltas = {number: each.values.wait() for number, each in enumerate(solved) if each.values is not None}
        sent = self._forge(round, deltas)
        deltas = {number: delta for number, delta in sent.items() if unfit(delta) is None}
        bad = self._settings.robust.still_bad(len(sent) - len(deltas))
        counted = self._verdict(deltas, bad)
        if counted:
            steps = [solved[number].steps for number in counted]
            mean = robust.aggregate(
                self._settings.robust.rule,
                bad,
                [deltas[number] for number in counted],
                [solved[number].weight for number in counted],
                steps if self._settings.round.weights == "normalised" else None,
                list(counted.values()),
            )
            move, self._server[block] = server_move(self._settings.server, mean, self._server.get(block, {}))
            self.blocks[block] = self.blocks[block] + move
        base = self._versions[block]
        if counted:
            self._versions[block] = round
        for number, client in enumerate(self.clients):
            arrived = Arrived(round, block, 1, base, len(counted), number in counted, 0.0, 0.0)
            client.take(arrived, self.blocks[block])

    def _verdict(self, deltas: Mapping[int, Vector], bad: int) -> dict[int, float]:
        """By client that counts, how much of its delta does. bad: how many of them may be."""
        rule = self._settings.robust
        if len(deltas) < robust.fewest(rule.rule, bad):
            return {}
        if not rule.measured:
            return dict.fromkeys(deltas, 1.0)
        names = {str(number): number for number in deltas}
        verdict = judge(rule, list(names), products(list(deltas.values()), pairs=rule.by_distance), bad)
        return {names[name]: factor for name, factor in verdict.factors.items()}


class Client:
    """One client: `workers.rounds` without a link. steps: of a round."""

    def __init__(self, settings: Config, index: int, steps: int) -> None:
        shard = (index, settings.round.clients)
        local = Local(f"worker-{index}", settings.data.train, settings.data.eval, shard, "", "cpu", 1, False)
        self.setup = prepare(json.dumps(config.to_dict(settings, shared_only=True)), local)
        self._settings = settings
        self._steps = steps
        self._arrivals: deque[Delivery] = deque()
        self._trainer = Trainer(self.setup, settings.round.clients, self._arrivals, lambda _round, _step: None)
        self._astray = False
        self.misses: list[float] = []
        self.synchronous = 0

    def train(self, round: int, blocks: Sequence[int]) -> list[Solved]:
        """Land what has to have landed before the round, and train it, with those that are trained together with it."""
        self.land(round, self._settings.delay)
        if self._astray:
            self.synchronous += 1
            self._astray = False
            self.land(round, 0)
        return self._trainer.train(round, blocks, self._steps)

    def land(self, round: int, delay: int) -> None:
        landed = self._trainer.land(round - delay - 1, round)
        limit = self._settings.pipeline.max_miss if self._settings.delay else 0.0
        self._astray = self._astray or any(0.0 < limit < each.miss for each in landed)
        self.misses += [each.miss for each in landed]

    def take(self, arrived: Arrived, values: Vector) -> None:
        if not arrived.contributors:
            self._arrivals.append(Delivery(arrived, None, change=False))
            return
        brought: Future[Incoming] = Future()
        brought.set_result(self.setup.staging.bring(values))
        self._arrivals.append(Delivery(arrived, brought, change=False))

    def evaluate(self) -> Scores:
        return total(self._trainer.evaluate().values())


def outcome(
    settings: Config, steps: Sequence[int] | None = None, forge: Forge | None = None, disturbance: float = 0.0
) -> Outcome:
    """Of a run on one torch thread, from its beginning to its end. The arguments are `Simulation`'s."""
    _alone()
    return Simulation(settings, steps, forge, disturbance).run()


def pretrain(settings: Config, out: Path) -> None:
    """Run, and keep the model in the folder `out`, as Hugging Face's `from_pretrained` reads it."""
    _alone()
    made = Simulation(settings)
    made.run()
    setup = made.clients[0].setup
    setup.model.save_pretrained(out)
    setup.tokenizer.save_pretrained(out)


def _alone() -> None:
    """Of a process that does nothing else."""
    torch.set_num_threads(1)
    models.quiet()


def check(settings: Config) -> None:
    """Raises ValueError, with what to do, where a run of these settings cannot be simulated."""
    lossy = [name for name in (settings.codec.up, settings.codec.down) if name != "float32"]
    for wrong, told in (
        (settings.pipeline.land != "boundary", 'pipeline.land = "arrival" depends on the link'),
        (settings.solver.adaptive, "solver.adaptive depends on the link"),
        (bool(lossy), f"codecs are not simulated ({', '.join(lossy)})"),
        (settings.announced, "the broker decides as the run goes who trains what"),
        (settings.privacy.private, "privacy adds noise that is not simulated"),
        (not settings.data.eval, "data.eval names no held-out rows"),
    ):
        if wrong:
            raise ValueError(f"{told}; a simulation has no such thing: run it with bench.convergence")
