"""The round loop of a client: two activities, communication and computation, and where they meet.

    compute   │ round t ─────────────▸│ round t+1 ───────────▸│ round t+2 ...
    link      │   block t−1 up, down  │   block t up, down    │
                                      ▴                       ▴
                              settle: t−1 lands       settle: t lands

`settle` is the only place where training waits for the link, and the wait is what the metrics call exposed. In the
synchronous mode nothing is in flight, so that it waits for the round that has just been trained, and so it does once
after a guess that missed by more than `pipeline.max_miss`. A client that sits a round out passes it by; what it then
waits for is its turn, not the link. Of rounds that are trained at once (`config.together`) it waits for all.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from parablock import messages
from parablock.adaptive_steps import AdaptiveSteps
from parablock.noise import Noise
from parablock.participant_events import Contribute, Progress, Say, SitOut, Wait, Withhold
from parablock.scores import total
from workers.noised import Noised, Nothing
from workers.state_folder import Contribution

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parablock.agenda import Turn
    from parablock.participant_events import Arrived
    from parablock.scores import Scores
    from workers.executor import TorchExecutor
    from workers.keeper import Keeper
    from workers.lag import LoopLag
    from workers.link import Link
    from workers.outbox import Leaving
    from workers.releases import Releases
    from workers.setup import Setup
    from workers.state_folder import State
    from workers.trainer import Landed, Solved, Trainer

log = logging.getLogger("worker")

Span = tuple[float, float]
_NEVER: Span = (0.0, 0.0)


class RoundLoop:
    """One client's part in a run, from the start it was given to the drained pipeline.

    keeper: told of every round that is behind. state: where an earlier process left off, as the trainer has resumed it.
    releases: needed where this client adds its own noise (`privacy.where = "local"`). noise: where that comes from.

    There, what else its rows would show is not told (README, "Privacy"): a training that has come to nothing is noise
    like any other, and the guard, whose waits the broker sees, is off.
    """

    def __init__(
        self,
        setup: Setup,
        link: Link,
        torch: TorchExecutor,
        trainer: Trainer,
        lag: LoopLag,
        keeper: Keeper | None = None,
        state: State | None = None,
        releases: Releases | None = None,
        noise: Noise | None = None,
    ) -> None:
        assert releases is not None or not setup.config.privacy.local, "nobody counts what leaves"
        self._setup = setup
        self._private = setup.config.privacy.local
        self._releases = releases
        self._noise = noise or Noise()
        self._link = link
        self._torch = torch
        self._trainer = trainer
        self._lag = lag
        self._steps = AdaptiveSteps(setup.config.solver, setup.config.delay)
        self._taken: dict[int, int] = {}  # round → the steps of it
        self._computed: dict[int, Span] = {}
        self._waited: dict[int, Span] = {}
        self._landed = -1  # all rounds through this one have
        self._astray = False  # the newest guess to be replaced had missed by too much: train upon no other one
        self._given = -1  # the last round committed before a start that passes rounds by: nothing of them is awaited
        self._keeper = keeper
        self._resumed = None if state is None else state.position
        self._missed: set[int] = set()  # as `_astray`, of what the earlier process has landed since its last round
        if state is not None and self._resumed is not None:
            self._astray = self._resumed.astray
            since = [block for block in state.blocks.values() if block.position == self._resumed.round]
            self._missed = {block.round for block in since if self._too_far(block.miss)}

    async def run(self) -> None:
        """Raises SessionEnded, Interrupted (see `workers.link`), and Stopped when the trainer was stopped."""
        config = self._setup.config
        every = config.eval.every
        position = -1 if self._resumed is None else self._resumed.round
        round = await self._start(position)
        if round == 0:
            await self._evaluate(-1)
        elif round == position < config.rounds and every and round % every == 0:
            round = await self._evaluate_amid(round, round - 1)
        while round < config.rounds:
            round = await self._settle(round)
            if round >= config.rounds:
                break
            before, round = round, await self._take_turn(round)
            if self._keeper is not None:
                self._keeper.moved_on(round, self._trainer.surplus, self._trainer.clients, astray=self._astray)
            if every and round // every > before // every and round < config.rounds:
                round = await self._evaluate_amid(round, round // every * every - 1)
        await self._settle(config.rounds + config.delay)
        await self._evaluate(config.rounds - 1)

    async def _take_turn(self, round: int) -> int:
        """Train the round, with those that are trained together with it, or pass it by; returns where to go on."""
        link, together = self._link, self._setup.config.together
        if not self._turn(round).trains:
            link.handle(SitOut(round))
            await self._torch(self._trainer.sit_out)
        elif self._releases is not None and (reason := self._releases.refusal(round)) is not None:
            link.handle(Withhold(round, reason))
        elif round % together:
            link.handle(Withhold(round, "what it is trained together with was not trained here"))
        else:
            await self._train(range(round, round + together))
            round += together - 1
        return max(round + 1, link.participant.told)

    async def _train(self, rounds: range) -> None:
        """Train the blocks of these rounds at once, and hand over what came of each."""
        blocks = [self._turn(round).block for round in rounds]
        under_way = filter(None, map(self._link.participant.turn, range(max(self._landed + 1, 0), rounds[0])))
        steps = self._steps.next(blocks[0], [turn.block for turn in under_way if turn.trains])
        for solved in await self._torch(self._trainer.train, rounds[0], blocks, steps):
            self._taken[solved.round] = steps
            await self._contribute(solved)

    def _turn(self, round: int) -> Turn:
        turn = self._link.participant.turn(round)
        assert turn is not None, f"round {round} may be trained, and is not known"
        return turn

    async def _settle(self, round: int) -> int:
        """Wait until all that `round` builds on is here, put it in place, and return the round to train.

        That is `round` itself, unless the broker has lost touch with us meanwhile and starts us elsewhere.
        """
        config = self._setup.config
        round = await self._land(round, config.delay)
        if self._astray and round < config.rounds and self._turn(round).trains:
            self._astray = False
            round = await self._land(round, 0)
        return round

    async def _land(self, round: int, delay: int) -> int:
        """`_settle`, with so many rounds on the way while `round` trains."""
        config = self._setup.config
        began = time.monotonic()
        while True:
            landing = min(round - delay, config.rounds) - 1
            if not self._ready(landing):
                self._link.handle(Wait(landing))
            await self._link.until(partial(self._ready, landing))
            if self._link.started is None:
                break
            round = await self._start(round)
        behind = map(self._link.participant.turn, range(max(landing + 1, 0), min(round, config.rounds)))
        if all(turn is not None and turn.trains for turn in behind):  # else it had nothing to hide the exchange behind
            for waited in range(landing - config.together + 1, landing + 1):
                if waited in self._computed:
                    self._waited[waited] = (began, time.monotonic())
        arrival = config.mode == "parablock" and config.pipeline.land == "arrival"
        through = round if arrival else max(landing, self._given)
        self._landed = max(self._landed, landing)
        self._report(await self._torch(self._trainer.land, through, min(round, config.rounds)))
        if missed := {earlier for earlier in self._missed if earlier <= landing}:
            self._astray = True
            self._missed -= missed
        return round

    def _ready(self, landing: int) -> bool:
        link, ahead = self._link, self._setup.config.in_flight + 1
        return link.started is not None or link.participant.may_train(landing + ahead)

    async def _start(self, round: int) -> int:
        """Take a (new) start: forget what will not be told any more, and return where to go on."""
        await self._link.until(lambda: self._link.started is not None)
        started, self._link.started = self._link.started, None
        assert started is not None
        self._given = started.next - 1 if started.next > round else -1
        await self._torch(self._trainer.revert, started.next, started.pending)
        log.info("start: round %d of %d, %d clients", started.round, self._setup.config.rounds, started.clients)
        return max(round, started.round)

    async def _contribute(self, solved: Solved) -> None:
        """Hand the delta to the link, which sends it while the next round trains."""
        self._computed[solved.round] = (solved.began, solved.ended)
        name = self._setup.manifest.blocks[solved.block].name
        if self._keeper is not None and solved.learnt is not None:
            self._keeper.learnt(solved.block, solved.round, solved.learnt)
        if solved.values is None:
            log.error("round %d (%s) was of no use: %s", solved.round, name, solved.reason)
        if self._private:
            await self._release(solved)
        elif solved.values is None:
            self._link.handle(Withhold(solved.round, solved.reason[:1000]))
        else:
            contribution = Contribute(solved.round, solved.block, solved.weight, solved.steps, solved.loss)
            self._send(contribution, solved, solved.values, solved.values)
        if solved.values is not None:
            steps, seconds = solved.steps, solved.ended - solved.began
            self._steps.trained(solved.block, steps, seconds)
            log.info("round %d (%s): loss %.4f, %d steps, %.2f s", solved.round, name, solved.loss, steps, seconds)
        self._report(solved.landed)

    async def _release(self, solved: Solved) -> None:
        """Hand over what may be told of the delta, if anything may. That it has left is on disk before it does."""
        assert self._releases is not None
        delta = solved.values or Nothing(self._setup.manifest.blocks[solved.block].numel)
        if self._link.participant.wants(solved.round):
            reason = self._releases.refusal(solved.round)
            try:
                if reason is None:
                    await self._torch(self._releases.release, solved.round)
            except OSError as error:
                reason = f"the worker's disk refuses to note that it leaves: {error.strerror or error}"
                log.error("round %d is not sent: %s", solved.round, reason)
            if reason is not None:
                self._link.handle(Withhold(solved.round, reason))
                return
        noised = Noised(delta, self._setup.config.privacy, self._noise)
        self._send(Contribute(solved.round, solved.block, 1, solved.steps, 0.0), solved, delta, noised)

    def _send(self, contribution: Contribute, solved: Solved, delta: Leaving, leaving: Leaving) -> None:
        """delta: what stands in the own model. leaving: what the broker gets."""
        offered, encoded = self._link.contribute(contribution, leaving)
        if self._keeper is not None:
            built_on = None if solved.values is None else solved.built_on  # of what is nothing there is no guess
            weight, steps, loss = contribution.weight, contribution.steps, contribution.loss
            kept = Contribution(solved.round, solved.block, weight, steps, loss, offered, solved.alpha, built_on)
            stored = None if solved.values is None else partial(self._link.stored, solved.round, solved.values)
            self._keeper.contributed(kept, delta, encoded, solved.start, stored)

    def _report(self, landed: list[Landed]) -> None:
        if not landed:
            return
        lag_ms = self._lag.take_p99_ms()
        for block in landed:
            arrived = block.arrived
            if self._too_far(block.miss):
                self._astray = True
                told = "round %d: the guess was off by %.2f times the step; training waits for what is in flight"
                log.warning(told, arrived.round, block.miss)
            computing = self._computed.pop(arrived.round, _NEVER)
            uploading = self._link.uploads.pop(arrived.round, _NEVER)
            if arrived.counted and computing != _NEVER:
                self._steps.exchanged(arrived.block, _exchange_s(computing, arrived))
            report = messages.Landed(
                round=arrived.round,
                computing=computing,
                uploading=uploading,
                downloading=(arrived.began, arrived.ended),
                waiting=self._waited.pop(arrived.round, _NEVER),
                alpha=0.0 if self._private else block.alpha,
                drift=0.0 if self._private else block.drift,
                miss=0.0 if self._private else block.miss,
                steps=self._taken.pop(arrived.round, 0),
                staleness=block.staleness,
                loop_lag_ms=lag_ms,
            )
            self._link.handle(Say(report))

    def _too_far(self, miss: float) -> bool:
        """Whether the guard minds it."""
        limit = self._setup.config.pipeline.max_miss
        return bool(limit and miss > limit and self._setup.config.delay and not self._private)

    async def _evaluate_amid(self, round: int, after: int) -> int:
        """Evaluate before `round`, as what the model is after the round `after`; returns where to go on.

        Where this client hides by noise what its rows are, the model must not hold a guess, which is without noise.
        """
        if self._private:
            round = await self._land(round, 0)
        await self._evaluate(after)
        return round

    async def _evaluate(self, round: int) -> None:
        """Scores over the own held-out rows; without any, an empty report, so that nobody waits for one."""
        scores: dict[str, Scores] = {}
        if self._setup.held_out is not None:
            self._link.handle(Progress(-1, 0))
            scores = await self._torch(self._trainer.evaluate)
        whole = total(scores.values())
        if not math.isfinite(whole.loss_sum):
            log.error("held-out loss after round %d is not finite; it is reported as unknown", round)
            scores = {task: replace(each, loss_sum=0.0, tokens=0) for task, each in scores.items()}
        elif whole.tokens:
            log.info("held-out loss after round %d: %.4f (%d tokens)", round, whole.loss, whole.tokens)
        self._link.handle(Say(_share(round, scores)))


def _share(round: int, scores: Mapping[str, Scores]) -> messages.Evaluated:
    parts = scores.values()
    return messages.Evaluated(
        round=round,
        tasks=tuple(scores),
        rows=tuple(part.rows for part in parts),
        loss_sums=tuple(part.loss_sum for part in parts),
        tokens=tuple(part.tokens for part in parts),
        correct=tuple(part.correct for part in parts),
        answered=tuple(part.answered for part in parts),
    )


def _exchange_s(computing: Span, arrived: Arrived) -> float:
    """Seconds from the own delta ready to the block held, had the own contribution been the last to be complete.

    Slower ones are no part of it, also where the block comes down chunk by chunk as theirs go up.
    """
    return max(arrived.ended - computing[1] - arrived.ahead_s, 0.0)
