"""The protocol joined in memory: a coordinator and its workers under one virtual clock, over links made bad by a seed.

No socket, no sleep, no torch. Every message passes through the codec. A worker plays `workers.rounds.RoundLoop` with a
fake trainer, folds use `parablock.aggregation`, and what must always hold is asserted after each event, by what the
whole world knows rather than by what the machines say of themselves:

    rounds are committed in order and once, and the fold has each client once, in roster order, only if it takes part;
    what is folded is what one process of that client made for that round, byte for byte;
    what is committed is what the server optimizer and the codec's feedback make of it, by their formulas, bit for bit;
    what arrives is what was committed, byte for byte, once per process, and every model holds it bit for bit;
    a chunk that goes down is encoded once, and the one message shared by all who get it;
    nobody trains a round before all that it builds on has landed, nor a round twice, nor more than `delay` ahead;
    a client trains what it was told of a round by the time it may, and nobody is told otherwise of its block;
    a tick that was due leaves nothing due.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from broker.blocks import BaseModel, GlobalBlocks
from broker.store import BlockStore
from parablock import config as settings
from parablock import coordinator_events as events
from parablock import participant_events as worker
from parablock import wire
from parablock.agenda import Turn
from parablock.aggregation import server_move, weighted_mean
from parablock.codec import codec_of
from parablock.coordinator import Coordinator, Phase
from parablock.importance import ImportanceOrder
from parablock.layout import Layout
from parablock.learning_rate import learning_rate
from parablock.manifest import Block, Manifest, Slot
from parablock.messages import Chunk, Commit, Evaluated, Message, Start
from parablock.participant import Participant, State
from parablock.participant_events import End
from parablock.saved import Saved, SavedVersion
from parablock.schedule import Schedule
from parablock.transfer import Encoded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from parablock.block_file import Label
    from parablock.journal import Row
    from parablock.saved import Entry

    Vector = npt.NDArray[np.float32]

RUN, BASE, TOKENIZER = "run-1", "ba5e", "70ce"
SIZES = (300, 500, 257, 640)
"""Elements of each block: two to three chunks of 1024 bytes, most with a remainder."""


def manifest_of(sizes: Iterable[int] = SIZES) -> Manifest:
    blocks = [Block(i, f"block {i}", (Slot(f"w{i}", (n,), "float32", 0),)) for i, n in enumerate(sizes)]
    return Manifest(tuple(blocks), ())


def saved_of(journal: Sequence[tuple[Entry, bytes | None]]) -> Saved:
    """What a broker finds that begins with this journal: of each round the entry, and what it made of its block."""
    if not journal:
        return Saved(0)
    versions = {}
    for entry, values in journal:
        if values is not None:
            made = entry.block, entry.round, entry.base, entry.contributors, memoryview(values)
            versions[entry.block] = SavedVersion(*made)
    last = json.loads(json.dumps(dataclasses.asdict(journal[-1][0])))
    return Saved(
        last["round"] + 1, tuple(versions.values()), last["agenda"], tuple(last["clients"]), tuple(last["tardy"])
    )


VARYING = {"adaptive": True, "steps": 1, "min_steps": 1, "max_steps": 3}
"""Settings of the solver with which clients take as many steps as they like, within bounds."""


def config_of(
    clients: int = 2,
    rounds: int = 6,
    *,
    quorum: int = 0,
    fraction: float = 1.0,
    deadline_s: float = 0.0,
    window: int = 2048,
    **top: Any,
) -> Any:
    """A config with short times: heartbeat 1 s, timeout 6 s, resend 3 s; chunks of 1024 bytes, two of them a window.

    A round takes one step, unless `solver` says otherwise.
    """
    network = {"chunk_bytes": 1024, "window_bytes": window, "heartbeat_s": 1.0, "timeout_s": 6.0, "resend_s": 3.0}
    policy = {"clients": clients, "quorum": quorum, "fraction": fraction, "deadline_s": deadline_s}
    tree = {"rounds": rounds, "network": network, "round": policy, "solver": {"steps": 1}, **top}
    return settings.from_dict(tree)


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
    """How a client trains. seconds: of a round, drawn from a range. diverges: rounds withheld. spoils: with a NaN.

    astray: how often, from 0 to 1, its guard makes it wait for all that is in flight before it trains.
    """

    seconds: tuple[float, float] = (0.5, 1.5)
    diverges: frozenset[int] = frozenset()
    spoils: frozenset[int] = frozenset()
    astray: float = 0.0
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
    """A contribution as it left a trainer. chunks: encoded."""

    values: bytes
    chunks: tuple[bytes, ...]
    weight: int
    steps: int
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
    buffers: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)  # by round and attempt: chunks, in order
    arrivals: list[tuple[worker.Arrived, list[bytes]]] = field(default_factory=list)
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
                case worker.Took(round, block, attempt, index, payload):
                    assert block == network.block(round)
                    chunks = self.buffers.setdefault((round, attempt), [])
                    assert index == len(chunks), "a chunk was taken out of order, or twice"
                    chunks.append(bytes(payload))
                case worker.Dropped(round, attempt):
                    del self.buffers[round, attempt]
                case worker.Arrived(round, _, attempt):
                    chunks = self.buffers.pop((round, attempt), [])
                    network.check_arrival(self, effect, chunks)
                    self.arrivals.append((effect, chunks))
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
        target = config.rounds + config.delay if done else self.position
        if self.position < 0 or not self.participant.may_train(target + config.together - 1):
            return
        turn = None if done else self.network.turn(self)
        if turn is not None and turn.trains and self._astray():
            target += config.delay
            if not self.participant.may_train(target):
                return
        arrival = config.mode == "parablock" and config.pipeline.land == "arrival"
        through = target if arrival else max(target - config.delay - 1, self.given)
        self.land(lambda arrived: arrived.round <= through)
        if turn is not None and not turn.trains:
            round, self.position = self.position, max(self.position + 1, self.participant.told)
            self.handle(worker.SitOut(round))  # which comes back here
            return
        if not done and self.position % config.together:
            round, self.position = self.position, max(self.position + 1, self.participant.told)
            self.handle(worker.Withhold(round, "its partner was not trained here"))  # likewise
            return
        self.busy = True
        if done:
            self.handle(worker.Say(Evaluated(config.rounds - 1, (), (), (), (), (), ())))
            self.handle(worker.Finish("done"))
        else:
            made = [self.network.train(self, self.position + number) for number in range(config.together)]
            seconds = self.network.rng.uniform(*self.habits.seconds)
            if arrival:
                active = self.network.block(self.position)
                self.network.after(seconds / 2, lambda: self.land(lambda arrived: arrived.block != active), self)
            self.network.after(seconds, lambda: self.contribute(self.position, made), self)

    def _astray(self) -> bool:
        """Whether the guard holds back the round that the loop is at; the same whenever it is asked."""
        return random.Random(f"{self.name}/{self.position}").random() < self.habits.astray

    def land(self, wanted: Callable[[worker.Arrived], bool]) -> None:
        """Put in place what has arrived and is wanted, in the order of rounds."""
        waiting = []
        for arrived, chunks in sorted(self.arrivals, key=lambda arrival: arrival[0].round):
            held, content = self.blocks.get(arrived.block, (-1, b""))
            change = arrived.contributors and not self.network.layout(arrived).codec.lossless
            if not wanted(arrived):
                waiting.append((arrived, chunks))
            elif arrived.contributors and arrived.round > held:
                layout = self.network.layout(arrived)
                parts = [layout.part(index) for index in range(layout.count)]
                values = np.concatenate(
                    [layout.codec.decode(memoryview(c), p.stop - p.start) for c, p in zip(chunks, parts, strict=True)]
                )
                if change:
                    assert held == arrived.base, "a change of a version that is not here"
                    values = (np.frombuffer(content, np.float32) if content else np.zeros_like(values)) + values
                self.blocks[arrived.block] = (arrived.round, values.tobytes())
        self.arrivals = waiting

    def contribute(self, first: int, made: list[Made]) -> None:
        """What was trained at once, for the rounds from `first` on."""
        # Set here, since the loop goes on after the last event.
        self.position = max(first + len(made), self.participant.told)
        for round, each in enumerate(made, start=first):
            self.busy = round < first + len(made) - 1
            self._contribute(round, each)

    def _contribute(self, round: int, made: Made) -> None:
        block = self.network.block(round)
        if round in self.habits.diverges:
            self.handle(worker.Withhold(round, "the loss is not finite"))
            return
        # Encoded one after the other on a thread of the process, while it goes on.
        for number, chunk in enumerate(made.chunks):
            event = worker.Ready(round, Encoded(memoryview(chunk)))
            self.network.after(0.01 * (1 + number), lambda event=event: self.handle(event), self)
        self.handle(worker.Contribute(round, block, made.weight, made.steps, made.loss))


@dataclass
class Folder:
    """Where the broker keeps its blocks: the newest of each. A real one is `parablock.run_folder`'s business."""

    stored: dict[int, bytes] = field(default_factory=dict)

    def listed(self) -> dict[int, list[int]]:
        return {}

    def writer(self, label: Label, numel: int, names: Sequence[str]) -> Writer:
        assert "block" in names
        return Writer(self, label, numel)

    def drop(self, index: int, version: int) -> None:
        """It holds no superseded ones."""


@dataclass
class Rows:
    """The journal of a broker that is not restarted."""

    rows: list[Row] = field(default_factory=list)

    def append(self, row: Row) -> None:
        self.rows.append(row)


@dataclass
class Writer:
    folder: Folder
    label: Label
    numel: int
    content: bytes = b""

    def write(self, parts: Mapping[str, Vector]) -> None:
        self.content += parts["block"].tobytes()

    def commit(self, _entry: str) -> None:
        assert len(self.content) == 4 * self.numel
        self.folder.stored[self.label.index] = self.content

    def abort(self) -> None:
        self.content = b""


class Formula:
    """The global model by the formulas of `parablock.aggregation` and `parablock.feedback`, on whole vectors."""

    def __init__(self, config: settings.Config, manifest: Manifest) -> None:
        self._config = config
        self._x = [np.zeros(block.numel, np.float32) for block in manifest.blocks]
        self._state: dict[int, dict[str, Vector]] = {}
        self._residuals: dict[int, Vector] = {}

    def move(self, block: int, deltas: list[Vector], weights: list[int], steps: list[int]) -> bytes:
        """What the block becomes when these contributions are counted, in this order."""
        mean = weighted_mean(deltas, weights, steps)
        move, self._state[block] = server_move(self._config.server, mean, self._state.get(block, {}))
        codec = codec_of(self._config.codec.down)
        if not codec.lossless:
            wanted = move + self._residuals.get(block, np.float32(0.0))
            move = codec.decode(codec.encode(wanted), wanted.size)
            if self._config.codec.error_feedback:
                self._residuals[block] = wanted - move
        self._x[block] = self._x[block] + move
        return self._x[block].tobytes()

    def content(self, block: int) -> Vector:
        return self._x[block]


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
        self.told: dict[tuple[str, int], Turn] = {}  # by client and round, what the broker has said of it
        self.made_up = 0  # how often one that was not drawn was asked to train all the same
        self._schedule = Schedule.of(config, len(self.manifest.blocks))
        self._importance = ImportanceOrder(len(self.manifest.blocks), config.in_flight)
        self._blocks_by_round = [self._importance.next() for _ in range(config.in_flight + 1)]
        self.coordinator = Coordinator(config, self.manifest, BASE, TOKENIZER, RUN, 1)
        self.over: events.Over | None = None
        self.over_at = 0.0
        self.processes: list[Process] = []
        # The ledger: what has happened, by round.
        self.entries: list[Entry] = []
        self.committed: list[events.Committed] = []
        self.values: list[bytes | None] = []  # what each round made of its block
        self.made: dict[tuple[str, int], list[Made]] = defaultdict(list)
        self.folds: list[events.Fold] = []
        self.folder = Folder()
        self._formula = Formula(config, self.manifest)
        self._chunks: dict[tuple[int, int, int], wire.Envelope] = {}  # sent down, by round, attempt and offset
        self.notes: list[events.Note] = []
        self.starts: dict[str, list[Start]] = defaultdict(list)
        self.sent: list[Sent] = []
        zeros = [np.zeros(block.numel, np.float32) for block in self.manifest.blocks]
        self._blocks = GlobalBlocks(BaseModel(self.manifest, BASE, TOKENIZER, zeros), config)
        self._store = BlockStore(self.folder, Rows(), self.manifest.digest, 2)  # type: ignore[arg-type]
        self._folding_until = 0.0
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
                self.handle(events.Tick())
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
        base = round // self.config.together * self.config.together - self.config.delay
        assert len(self.committed) >= base, "training is too far ahead"
        for number in range(base):
            block = self.committed[number].block
            assert self.values[number] is None or process.blocks[block][0] >= number, f"round {number} has not landed"
        for made_by, values in process.blocks.values():
            assert values == self.values[made_by]
        process.trained.append(round)
        seed = zlib.crc32(f"{process.name} {process.token} {round}".encode())
        numel = self.manifest.blocks[self.block(round)].numel
        delta = np.random.default_rng(seed).standard_normal(numel, np.float32)
        if round in process.habits.spoils:
            delta[numel // 2] = np.nan
        layout = Layout.up(self.config, numel)
        chunks = tuple(bytes(layout.codec.encode(delta[layout.part(index)])) for index in range(layout.count))
        fewest, most = self.config.solver.step_bounds
        steps = fewest + seed % (most - fewest + 1)
        made = Made(delta.tobytes(), chunks, 1 + seed % 100, steps, float(seed % 7))
        self.made[process.name, round].append(made)
        return made

    def block(self, round: int) -> int:
        """Of a round that is decided, by what the whole world knows."""
        return self._blocks_by_round[round] if self._schedule is None else self._schedule.block(round)

    def turn(self, process: Process) -> Turn:
        """What the round at which a process is, and which it may train, is for it."""
        turn = process.participant.turn(process.position)
        assert turn is not None, "it is not known by then"
        assert turn.block == self.block(process.position)
        if self.config.announced:
            assert turn == self.told[process.name, process.position]
        else:
            assert turn.trains
        return turn

    def _tell(self, process: Process, message: Start | Commit) -> None:
        first = message.next if isinstance(message, Start) else message.round + self.config.in_flight + 1
        assert self.config.announced or not message.blocks, "what follows from the settings is not said"
        for round, said in enumerate(zip(message.blocks, message.trains, strict=True), start=first):
            turn = Turn(*said)
            told = self.told.setdefault((process.name, round), turn)
            assert turn.block == told.block == self.block(round)
            # Who has been away may have to make up for somebody who was drawn and is gone.
            assert turn.trains >= told.trains
            self.made_up += turn.trains > told.trains
            self.told[process.name, round] = turn

    def layout(self, arrived: worker.Arrived) -> Layout:
        return Layout.down(self.config, self.manifest.blocks[arrived.block].numel, arrived.attempt)

    def check_arrival(self, process: Process, arrived: worker.Arrived, chunks: list[bytes]) -> None:
        commit = self.committed[arrived.round]
        assert arrived.round not in process.arrived, "a round has arrived twice"
        process.arrived.add(arrived.round)
        assert (arrived.block, arrived.contributors) == (commit.block, len(commit.contributors))
        assert arrived.counted == (process.name in commit.contributors)
        if self.layout(arrived).codec.lossless:
            content = b"".join(chunks) if arrived.contributors else None
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
                received = events.Received(process.peer, wire.decode(frames))
                self.after(arrives - self.now, lambda received=received: self.handle(received), self.coordinator)
            else:
                event = worker.Received(wire.decode(frames))
                self.after(arrives - self.now, lambda event=event: process.handle(event), process)

    # The broker

    def handle(self, event: events.Event) -> None:
        if self.over is not None:
            return
        effects = self.coordinator.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, events.Store):
                self._settle(effect.entry)
            elif isinstance(effect, events.Committed):  # before what is said of it
                self._commit(effect, event)
        for effect in effects:
            match effect:
                case events.Send(peer, envelope):
                    process = next(process for process in self.processes if process.peer == peer)
                    if isinstance(envelope.message, Start | Commit):
                        self._tell(process, envelope.message)
                    if isinstance(envelope.message, Start):
                        self.starts[process.name].append(envelope.message)
                    elif isinstance(envelope.message, Chunk):
                        key = (envelope.message.round, envelope.message.attempt, envelope.message.offset)
                        assert self._chunks.setdefault(key, envelope) is envelope, "a chunk was encoded twice"
                    self.carry(process, envelope, up=False)
                case events.Fold():
                    self._fold(effect)
                case events.Store():
                    self._execute(lambda store=effect: self._keep(store))
                case events.Committed():
                    pass  # looked at already
                case events.Note():
                    self.notes.append(effect)
                case events.Over():
                    self.over, self.over_at = effect, self.now
        clients = self.coordinator.clients
        assert len(clients) == len(set(clients)), "two sessions under one name"
        assert self.coordinator.next_round == len(self.committed)
        due, latest = self.coordinator.deadline(), self._latest_deadline()
        assert self.over is not None or latest is None or (due is not None and due <= latest), "a tick comes too late"
        self.arm(self.coordinator)

    def _latest_deadline(self) -> float | None:
        """When the coordinator must look again at the latest, of all that it waits for."""
        network, sessions = self.config.network, list(self.coordinator._roster)
        times = [session.heard_at + network.timeout_s for session in sessions]
        times += [d.progress_at + network.resend_s for session in sessions for d in session.downloads.values()]
        closes = self.coordinator._collection.deadline(self.now)
        return min(times if closes is None else [*times, closes], default=None)

    def _fold(self, fold: events.Fold) -> None:
        names = [contribution.client for contribution in fold.contributions]
        assert fold.round == len(self.committed), "folding out of order"
        assert fold.block == self.block(fold.round)
        assert names == sorted(set(names)), "the fold has each client once, in roster order"
        for contribution in fold.contributions:
            assert min(start.round for start in self.starts[contribution.client]) <= fold.round, "no member"
            if self.config.announced:
                assert self.told[contribution.client, fold.round].trains, "not drawn for this round"
            made = self.made[contribution.client, fold.round]
            sent = [(m.chunks[fold.index], m.weight, m.steps) for m in made]
            counted = (bytes(contribution.payload), contribution.weight, contribution.steps)
            assert counted in sent, "a mixed contribution"
        if self.folds and (self.folds[-1].round, self.folds[-1].attempt) == (fold.round, fold.attempt):
            before = self.folds[-1]
            assert fold.index == before.index + 1, "the chunks of an attempt are folded in order, each once"
            assert names == [contribution.client for contribution in before.contributions]
        else:
            assert fold.index == 0, "an attempt begins with the first chunk"
        self.folds.append(fold)
        self._execute(lambda: self._make(fold))

    def _make(self, fold: events.Fold) -> events.Event:
        made = self._blocks.fold(fold)
        if isinstance(made, events.Unfit):
            return made
        self._store.write(fold.round, fold.attempt, fold.block, made.numel, made.parts)
        return made.answer

    def _keep(self, store: events.Store) -> events.Event:
        tensors = self._blocks.tensors(store) if store.attempt else None
        self._store.commit(store, tensors)
        if tensors is None:
            return events.Stored(store.round, 0, None)
        self._blocks.settle(store)
        return events.Stored(store.round, store.attempt, tensors["block"].data.cast("B"))

    def _execute(self, act: Callable[[], events.Event]) -> None:
        """On the fold executor: one thing after the other, each taking a while."""
        self._folding_until = max(self._folding_until, self.now) + self.rng.uniform(0.0, 0.1)
        self.after(self._folding_until - self.now, lambda: self.handle(act()), self.coordinator)

    def _settle(self, entry: Entry) -> None:
        """It is settled who counts in a round, and so what comes in_flight + 1 rounds later."""
        assert entry.round == len(self.entries), "rounds are stored in order, each once"
        self.entries.append(entry)
        if entry.attempt and self._schedule is None:
            rate = learning_rate(self.config.solver, entry.round, self.config.rounds)
            self._importance.moved(entry.block, entry.moved / rate)
        self._blocks_by_round.append(self._importance.next())

    def _commit(self, commit: events.Committed, event: events.Event) -> None:
        assert commit.round == len(self.committed) == len(self.entries) - 1, "rounds are committed in order, each once"
        entry, values = self.entries[-1], None
        assert (commit.contributors, commit.late, commit.loss) == (entry.contributors, entry.late, entry.loss)
        if commit.contributors:
            assert isinstance(event, events.Stored)
            fold = self.folds[-1]
            assert (event.round, event.attempt) == (commit.round, fold.attempt) == (fold.round, fold.attempt)
            assert commit.contributors == tuple(contribution.client for contribution in fold.contributions)
            values = bytes(event.values)
            assert self.folder.stored[commit.block] == values, "announced before it was stored"
            before = self._formula.content(commit.block)
            assert self._expected(fold) == values, "what was made is not what the formulas say"
            rms = float(np.sqrt(np.mean(np.square(self._formula.content(commit.block) - before))))
            if self._schedule is None:
                assert entry.moved == pytest.approx(rms, rel=1e-3)
        self.committed.append(commit)
        self.values.append(values)

    def _expected(self, last: events.Fold) -> bytes:
        """What the formulas make of the contributions of an attempt, of which `last` was the last chunk."""
        folds = self.folds[-1 - last.index :]
        layout = Layout.up(self.config, self.manifest.blocks[last.block].numel)
        assert len(folds) == layout.count, "not all of it was folded"
        numels = [layout.part(index).stop - layout.part(index).start for index in range(layout.count)]
        chunks = zip(*(fold.contributions for fold in folds), strict=True)  # by client
        deltas = [
            np.concatenate([layout.codec.decode(c.payload, n) for c, n in zip(client, numels, strict=True)])
            for client in chunks
        ]
        weights = [contribution.weight for contribution in last.contributions]
        steps = [contribution.steps for contribution in last.contributions]
        return self._formula.move(last.block, deltas, weights, steps)

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
            forgotten = {note.client for note in self.notes if note.kind in ("lost", "behind")}
            if process.gone.end is End.LOST and process.name in forgotten:
                assert self.over_at < self.now - 60.0
                continue  # out of touch at the end, for so long that the broker went without it
            assert process.gone.end is End.DONE, process.gone
            assert {block: made for block, (made, _) in process.blocks.items()} == latest
            assert all(content == self.values[made] for made, content in process.blocks.values())
            assert not process.buffers, "what will not be completed is held for ever"
