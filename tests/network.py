"""The protocol joined in memory: a coordinator and its workers under one virtual clock, over links made bad by a seed.

No socket, no sleep, no torch. Every message passes through the codec. A worker plays `workers.rounds.RoundLoop` with a
fake trainer, folds use `parablock.aggregation`, and what must always hold is asserted after each event, by what the
whole world knows rather than by what the machines say of themselves:

    rounds are committed in order and once, and the fold has each client once, in roster order, only if it takes part;
    what is folded is what one process of that client made for that round, byte for byte;
    what arrives is what was committed, byte for byte, once per process;
    nobody trains a round before all that it builds on has landed, nor a round twice, nor more than in_flight ahead;
    a tick that was due leaves nothing due.
"""

from __future__ import annotations

import heapq
import json
import random
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from parablock import config as settings
from parablock import coordinator_events as broker
from parablock import participant_events as worker
from parablock import wire
from parablock.aggregation import ServerOptimizer, unfit, weighted_mean
from parablock.coordinator import Coordinator, Phase
from parablock.manifest import Block, Manifest, Slot
from parablock.messages import Evaluated, Message, Start
from parablock.participant import Participant, State
from parablock.participant_events import End
from parablock.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

RUN, BASE, TOKENIZER = "run-1", "ba5e", "70ce"
SIZES = (300, 500, 257, 640)
"""Elements of each block: two to three chunks of 1024 bytes, most with a remainder."""


def manifest_of(sizes: Iterable[int] = SIZES) -> Manifest:
    blocks = [Block(i, f"block {i}", (Slot(f"w{i}", (n,), "float32", 0),)) for i, n in enumerate(sizes)]
    return Manifest(tuple(blocks), ())


def config_of(clients: int = 2, rounds: int = 6, *, quorum: int = 0, deadline_s: float = 0.0, **top: Any) -> Any:
    """A config with short times: heartbeat 1 s, timeout 6 s, resend 3 s; chunks of 1024 bytes, two of them a window."""
    network = {"chunk_bytes": 1024, "window_bytes": 2048, "heartbeat_s": 1.0, "timeout_s": 6.0, "resend_s": 3.0}
    policy = {"clients": clients, "quorum": quorum, "deadline_s": deadline_s}
    return settings.from_dict({"rounds": rounds, "network": network, "round": policy, **top})


@dataclass(frozen=True)
class Incident:
    """Something that befalls `victim` (a worker's name, or "broker") at `at` and is over after `lasts` seconds.

    kind: `freeze` (SIGSTOP and SIGCONT: what comes meanwhile is handled late), `cut` (what is sent meanwhile, in either
    direction, is lost) or `kill` (the process is gone; after `lasts` another one comes under the name, if `returns`).
    """

    kind: str
    victim: str
    at: float
    lasts: float
    returns: bool = True


@dataclass(frozen=True)
class Faults:
    """What links do. delay_s: fewest and most seconds of one message. ordered: as on one connection, no overtaking."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.02)
    ordered: bool = True
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True)
class Habits:
    """How a client trains. seconds: of a round, drawn from a range. diverges: rounds withheld. spoils: with a NaN."""

    seconds: tuple[float, float] = (0.5, 1.5)
    diverges: frozenset[int] = frozenset()
    spoils: frozenset[int] = frozenset()
    joins_at: float = 0.0
    rows: int = 10
    base: str = BASE


class Sent(NamedTuple):
    """A message that was sent, whether or not it arrived. up: by the client, else to it."""

    at: float
    client: str
    up: bool
    message: Message


@dataclass(frozen=True)
class Made:
    """A contribution as it left a trainer."""

    values: bytes
    weight: int
    loss: float


@dataclass
class Process:
    """One process of a client: the participant, the round loop, and a model that holds only what has landed."""

    network: Network
    name: str
    token: str
    habits: Habits
    participant: Participant
    position: int = -1  # the round that the loop is at
    given: int = -1  # the last round committed before the newest start
    busy: bool = False
    dead: bool = False
    started: worker.Started | None = None
    arrivals: list[worker.Arrived] = field(default_factory=list)
    blocks: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # by block: its round and bytes
    arrived: set[int] = field(default_factory=set)
    trained: list[int] = field(default_factory=list)
    uploaded: list[int] = field(default_factory=list)
    dismissed: dict[int, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    gone: worker.Gone | None = None

    @property
    def peer(self) -> bytes:
        return bytes.fromhex(self.token)

    def handle(self, event: worker.Event) -> None:
        """Give the participant an event, perform its effects, and let the loop go on as far as it can."""
        network = self.network
        for effect in self.participant.handle(event, network.now):
            match effect:
                case worker.Send(envelope):
                    network.carry(self, envelope, up=True)
                case worker.Prepare(config):
                    assert settings.from_dict(json.loads(config)) == network.config
                    network.after(0.5, lambda: self.handle(network.prepared(self.habits)), self)
                case worker.Started():
                    self.started = effect
                case worker.Arrived():
                    network.check_arrival(self, effect)
                    self.arrivals.append(effect)
                case worker.Uploaded(round):
                    self.uploaded.append(round)
                case worker.Dismissed(round, reason):
                    assert round not in self.dismissed, "told twice"
                    self.dismissed[round] = reason
                case worker.Notice(text):
                    self.notices.append(text)
                case worker.Gone():
                    self.gone = effect
        self.loop()
        network.arm(self)

    def loop(self) -> None:
        """`RoundLoop.run`, from where it waited to where it waits again."""
        if self.busy or self.dead or self.gone is not None or self.participant.state is State.LEAVING:
            return
        if self.started is not None:
            self.position, self.given = max(self.position, self.started.round), self.started.next - 1
            self.started = None
        config = self.network.config
        done = self.position >= config.rounds
        target = config.rounds + config.in_flight if done else self.position
        if self.position < 0 or not self.participant.may_train(target):
            return
        arrival = config.mode == "parablock" and config.pipeline.land == "arrival"
        self.land(target if arrival else max(target - config.in_flight - 1, self.given))
        self.busy = True
        if done:
            self.handle(worker.Say(Evaluated(config.rounds - 1, 1, 0.0, 1, 0, 0)))
            self.handle(worker.Finish("done"))
        else:
            made = self.network.train(self, self.position)
            seconds = self.network.rng.uniform(*self.habits.seconds)
            self.network.after(seconds, lambda: self.contribute(self.position, made), self)

    def land(self, through: int) -> None:
        landing = sorted((a for a in self.arrivals if a.round <= through), key=lambda arrived: arrived.round)
        self.arrivals = [arrived for arrived in self.arrivals if arrived.round > through]
        for arrived in landing:
            if arrived.pieces is not None and arrived.round > self.blocks.get(arrived.block, (-1, b""))[0]:
                self.blocks[arrived.block] = (arrived.round, b"".join(arrived.pieces))

    def contribute(self, round: int, made: Made) -> None:
        self.busy = False
        self.position = max(round + 1, self.participant.told)  # set here, since the loop goes on after the event
        block = self.network.schedule.block(round)
        if round in self.habits.diverges:
            self.handle(worker.Withhold(round, "the loss is not finite"))
        else:
            self.handle(worker.Contribute(round, block, memoryview(made.values), made.weight, made.loss))


class Network:
    """See the module. `run` until everything has ended; then look at `coordinator`, `processes` and the ledger."""

    def __init__(
        self, config: settings.Config, clients: dict[str, Habits], faults: Faults | None = None, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.config = config
        self.rng = random.Random(seed)
        self.faults = faults or Faults()
        self.manifest = manifest_of()
        self.schedule = Schedule.of(config, len(self.manifest.blocks))
        self.coordinator = Coordinator(config, self.manifest, BASE, TOKENIZER, RUN, 1)
        self.over: broker.Over | None = None
        self.over_at = 0.0
        self.processes: list[Process] = []
        # The ledger: what has happened, by round.
        self.committed: list[broker.Committed] = []
        self.values: list[bytes | None] = []  # what each round made of its block
        self.made: dict[tuple[str, int], list[Made]] = defaultdict(list)
        self.folds: list[broker.Fold] = []
        self.notes: list[broker.Note] = []
        self.starts: dict[str, list[Start]] = defaultdict(list)
        self.sent: list[Sent] = []
        self._x = [np.zeros(block.numel, np.float32) for block in self.manifest.blocks]
        self._optimizer = ServerOptimizer(config.server)
        self._heap: list[tuple[float, int, Any, Callable[[], None]]] = []
        self._count = 0
        self._armed: dict[int, float] = {}
        self._connection: dict[tuple[bytes, bool], float] = {}  # when the newest message of an ordered link arrives
        for name, habits in clients.items():
            self.after(habits.joins_at, lambda name=name, habits=habits: self.join(name, habits))
        for incident in self.faults.incidents:
            if incident.kind == "kill":
                self.after(incident.at, lambda incident=incident: self._kill(incident))

    # The clock

    def after(self, seconds: float, act: Callable[[], None], whose: Any = None) -> None:
        """Do `act` later. whose: the process that does it; not done if that has died, late if it is frozen."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, whose, act))

    def run(self, until_s: float = 400.0) -> Network:
        """Go on until nothing is left to happen, or to a moment that a healthy run does not reach."""
        while self._heap and self._heap[0][0] <= until_s:
            due, _, whose, act = heapq.heappop(self._heap)
            self.now = max(self.now, due)
            if isinstance(whose, Process) and (whose.dead or whose.gone is not None):
                continue
            victim = "broker" if whose is self.coordinator else whose.name if isinstance(whose, Process) else ""
            thaws = self._thaws_at(victim)
            if thaws > self.now:
                self._count += 1
                heapq.heappush(self._heap, (thaws, self._count, whose, act))
                continue
            act()
        return self

    def arm(self, whose: Process | Coordinator, *, ticked: bool = False) -> None:
        """Set the timer of a machine to its deadline."""
        machine = whose.participant if isinstance(whose, Process) else whose
        over = whose.gone is not None if isinstance(whose, Process) else self.over is not None
        due = None if over else machine.deadline()
        assert not ticked or due is None or due > self.now, "a tick leaves something due: the process would spin"
        if due is None or self._armed.get(id(whose)) == due:
            return
        self._armed[id(whose)] = due

        def tick() -> None:
            if self._armed.get(id(whose)) != due:
                return  # set anew since
            del self._armed[id(whose)]
            if isinstance(whose, Process):
                whose.handle(worker.Tick())
            else:
                self.handle(broker.Tick())
            self.arm(whose, ticked=True)

        self.after(max(due - self.now, 0.0), tick, whose)

    def _befalls(self, kind: str, victim: str, moment: float) -> list[Incident]:
        incidents = [i for i in self.faults.incidents if (i.kind, i.victim) == (kind, victim)]
        return [incident for incident in incidents if incident.at <= moment < incident.at + incident.lasts]

    def _thaws_at(self, victim: str) -> float:
        """When a victim can act again; freezes that overlap are one."""
        moment = self.now
        while freezes := self._befalls("freeze", victim, moment):
            moment = max(incident.at + incident.lasts for incident in freezes)
        return moment

    # The workers

    def join(self, name: str, habits: Habits | None = None) -> Process:
        """A new process, under a name that may have had one before."""
        token = f"{len(self.processes) + 1:032x}"
        process = Process(self, name, token, habits or Habits(), Participant(name, token, 120.0, self.now))
        self.processes.append(process)
        process.handle(worker.Tick())
        return process

    def process(self, name: str) -> Process:
        """The newest process of a name."""
        return next(process for process in reversed(self.processes) if process.name == name)

    def prepared(self, habits: Habits) -> worker.Prepared:
        return worker.Prepared(self.config, self.manifest, habits.base, TOKENIZER, habits.rows)

    def _kill(self, incident: Incident) -> None:
        for process in self.processes:
            if process.name == incident.victim and not process.dead and process.gone is None:
                process.dead = True
                if incident.returns:
                    self.after(incident.lasts, lambda process=process: self._return(process))

    def _return(self, dead: Process) -> None:
        if self.over is None:
            self.join(dead.name, dead.habits)

    def train(self, process: Process, round: int) -> Made:
        """What a process makes of a round: its own random delta, whatever its model holds."""
        assert not process.trained or round > process.trained[-1], "a round is trained twice"
        base = round - self.config.in_flight
        assert len(self.committed) >= base, "training is too far ahead"
        for number in range(base):
            block = self.committed[number].block
            assert self.values[number] is None or process.blocks[block][0] >= number, f"round {number} has not landed"
        for made_by, values in process.blocks.values():
            assert values == self.values[made_by]
        process.trained.append(round)
        seed = zlib.crc32(f"{process.name} {process.token} {round}".encode())
        numel = self.manifest.blocks[self.schedule.block(round)].numel
        delta = np.random.default_rng(seed).standard_normal(numel, np.float32)
        if round in process.habits.spoils:
            delta[numel // 2] = np.nan
        made = Made(delta.tobytes(), 1 + seed % 100, float(seed % 7))
        self.made[process.name, round].append(made)
        return made

    def check_arrival(self, process: Process, arrived: worker.Arrived) -> None:
        commit = self.committed[arrived.round]
        assert arrived.round not in process.arrived, "a round has arrived twice"
        process.arrived.add(arrived.round)
        assert (arrived.block, arrived.contributors) == (commit.block, len(commit.contributors))
        assert arrived.counted == (process.name in commit.contributors)
        content = None if arrived.pieces is None else b"".join(arrived.pieces)
        assert content == self.values[arrived.round], "what arrived is not what was committed"

    # The link

    def carry(self, process: Process, envelope: wire.Envelope, *, up: bool) -> None:
        """Take a message across, if it gets across."""
        frames = [bytes(frame) for frame in wire.encode(envelope)]
        self.sent.append(Sent(self.now, process.name, up, envelope.message))
        faults, rng = self.faults, self.rng
        if self._befalls("cut", process.name, self.now) or rng.random() < faults.loss:
            return
        for _ in range(2 if rng.random() < faults.duplication else 1):
            arrives = self.now + rng.uniform(*faults.delay_s)
            if faults.ordered:
                arrives = self._connection[process.peer, up] = max(
                    arrives, self._connection.get((process.peer, up), 0.0)
                )
            if up:
                received = broker.Received(process.peer, wire.decode(frames))
                self.after(arrives - self.now, lambda received=received: self.handle(received), self.coordinator)
            else:
                event = worker.Received(wire.decode(frames))
                self.after(arrives - self.now, lambda event=event: process.handle(event), process)

    # The broker

    def handle(self, event: broker.Event) -> None:
        if self.over is not None:
            return
        for effect in self.coordinator.handle(event, self.now):
            match effect:
                case broker.Send(peer, envelope):
                    process = next(process for process in self.processes if process.peer == peer)
                    if isinstance(envelope.message, Start):
                        self.starts[process.name].append(envelope.message)
                    self.carry(process, envelope, up=False)
                case broker.Fold():
                    self._fold(effect)
                case broker.Committed():
                    self._commit(effect, event)
                case broker.Note():
                    self.notes.append(effect)
                case broker.Over():
                    self.over, self.over_at = effect, self.now
        clients = self.coordinator.clients
        assert len(clients) == len(set(clients)), "two sessions under one name"
        assert self.coordinator.next_round == len(self.committed)
        self.arm(self.coordinator)

    def _fold(self, fold: broker.Fold) -> None:
        names = [contribution.client for contribution in fold.contributions]
        assert fold.round == len(self.committed), "folding out of order"
        assert fold.block == self.schedule.block(fold.round)
        assert names == sorted(set(names)), "the fold has each client once, in roster order"
        for contribution in fold.contributions:
            assert min(start.round for start in self.starts[contribution.client]) <= fold.round, "no member"
            content = b"".join(contribution.pieces)
            made = self.made[contribution.client, fold.round]
            assert (content, contribution.weight) in [(m.values, m.weight) for m in made], "a mixed contribution"
        self.folds.append(fold)
        reasons = {c.client: reason for c in fold.contributions if (reason := unfit(c)) is not None}
        answer: broker.Event = broker.Unfit(fold.round, reasons)
        if not reasons:
            x = self._x[fold.block]
            new = self._optimizer.step(fold.block, x, weighted_mean(fold.contributions, x.size))
            self._x[fold.block] = new
            answer = broker.Folded(fold.round, memoryview(new.tobytes()))
        self.after(self.rng.uniform(0.0, 0.3), lambda: self.handle(answer), self.coordinator)

    def _commit(self, commit: broker.Committed, event: broker.Event) -> None:
        assert commit.round == len(self.committed), "rounds are committed in order, each once"
        values = None
        if commit.contributors:
            assert isinstance(event, broker.Folded)
            assert event.round == commit.round
            fold = self.folds[-1]
            assert commit.contributors == tuple(contribution.client for contribution in fold.contributions)
            values = bytes(event.values)
        self.committed.append(commit)
        self.values.append(values)

    # The end

    def check_ended(self) -> None:
        """Everything has ended well: all rounds committed, every live client drained and gone with the whole model."""
        state = f"round {self.coordinator.next_round}, {self.coordinator.phase}, {self.coordinator.clients}"
        assert self.coordinator.phase is Phase.OVER, f"the run has not ended: {state}"
        assert self.over is not None
        assert self.over.complete
        assert len(self.committed) == self.config.rounds
        latest = {commit.block: commit.round for commit in self.committed if commit.contributors}
        for process in self.processes:
            if process.dead:
                continue
            assert process.gone is not None, f"{process.name} is still {process.participant.state}"
            if process.gone.end is End.LOST and ("lost", process.name) in [(n.kind, n.client) for n in self.notes]:
                assert self.over_at < self.now - 60.0
                continue  # out of touch at the end, for so long that the broker went without it
            assert process.gone.end is End.DONE, process.gone
            assert {block: made for block, (made, _) in process.blocks.items()} == latest
