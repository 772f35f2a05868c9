"""The protocol joined in memory: a coordinator and its workers under one virtual clock, over links made bad by a seed.

No socket, no sleep, no torch. Every message passes through the codec. A worker plays `workers.rounds.RoundLoop` with a
fake trainer, folds use `parablock.aggregation`. Broker and workers die and come back, with what their disks have kept;
the broker's refuses now and then. What must always hold, over all of a run's brokers, is asserted after each event, by
what the whole world knows rather than by what the machines say of themselves:

    rounds are made durable in order and once, and nobody hears of a commit before;
    the fold has each client once, in roster order, only if it takes part;
    where that is measured first, all of it is, and who is folded, and how much of each, is what the rule says;
    what is folded is what one process of that client made for that round, byte for byte;
    a contribution counts once, in its own round or in a later one of its block, and its client is told no otherwise;
    what is committed is what the server optimizer and the codec's feedback make of it, by their formulas, bit for bit;
    what arrives is what was committed, byte for byte, once per process, and every model holds it bit for bit;
    a chunk that goes down is encoded once, and the one message shared by all who get it;
    nobody trains a round before all that it builds on has landed, nor a round twice, nor more than `delay` ahead;
    nobody is told of fewer commits than before, nor replaces a version of a block by an older one;
    a window and a chunk at most are under way to anybody, and no more blocks wait for that than there are;
    a client trains what it was told of a round by the time it may, and nobody is told otherwise of its block;
    what was said to an earlier broker, or by one, moves nobody;
    where contributions are masked, the mean is that of the plain sum to the last bit, and over all brokers a client's
    contribution to a slice of a round is unmasked with the same others only;
    where clients hide from the broker, each is charged for every round to which something has left it;
    nobody is given up who was heard within the time that is said, whatever the wall clock does;
    a run stops without its quorum only where that was missing for the time that is said, and goes on if begun again;
    a tick that was due leaves nothing due.
"""

from __future__ import annotations

import errno
import functools
import heapq
import json
import math
import random
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from broker.blocks import BaseModel, GlobalBlocks
from broker.store import BlockStore
from parablock import config as settings
from parablock import coordinator_events as events
from parablock import fixed_point, robust, wire
from parablock import participant_events as worker
from parablock.agenda import Turn
from parablock.aggregation import server_move
from parablock.block_file import BLOCK, StoredBlock
from parablock.codec import codec_of
from parablock.conversation import State
from parablock.coordinator import Coordinator, Phase
from parablock.importance import ImportanceOrder
from parablock.journal_rows import entry_from_json, entry_json
from parablock.layout import Layout
from parablock.learning_rate import learning_rate
from parablock.ledger import Ledger
from parablock.manifest import Block, Manifest, Slot
from parablock.measurement import Measurement
from parablock.messages import (
    Chunk,
    Commit,
    Evaluated,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Message,
    Refused,
    Rejoin,
    Start,
)
from parablock.participant import Participant
from parablock.participant_events import End
from parablock.privacy_settings import Privacy
from parablock.saved import EVERYBODY, Entry, Saved, SavedVersion, recent
from parablock.schedule import Schedule
from parablock.secure_settings import most_tokens
from parablock.sessions import SessionState
from parablock.transfer import Encoded
from tests import robust_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from parablock.aggregation import Contribution
    from parablock.block_file import Label
    from parablock.codec import CodecName
    from parablock.journal_rows import Row
    from parablock.masker import Masker

    Vector = npt.NDArray[np.float32]

RUN, BASE, TOKENIZER = "run-1", "ba5e", "70ce"
SIZES = (300, 500, 257, 640)
"""Elements of each block: two to three chunks of 1024 bytes, most with a remainder."""


def manifest_of(sizes: Iterable[int] = SIZES) -> Manifest:
    blocks = [Block(i, f"block {i}", (Slot(f"w{i}", (n,), "float32", 0),)) for i, n in enumerate(sizes)]
    return Manifest(tuple(blocks), ())


def saved_of(journal: Sequence[tuple[Entry, bytes | None]], in_flight: int) -> Saved:
    """What a broker finds that begins with this journal: of each round the entry, and what it made of its block."""
    if not journal:
        return Saved(0)
    versions = {}
    for entry, values in journal:
        if values is not None:
            made = entry.block, entry.round, entry.base, entry.counted, memoryview(values)
            versions[entry.block] = SavedVersion(*made)
    last = json.loads(entry_json(journal[-1][0]))
    late = {client: (made_for, entry.round) for entry, _ in journal for client, made_for in entry.late_parts}
    clients, tardy = tuple(last["clients"]), tuple(last["tardy"])
    ledger = Ledger(Privacy())
    for entry, _ in journal:
        ledger.take(entry.round, entry.charged)
    there = recent((entry for entry, _ in journal), in_flight)
    known = there, ledger.rounds, ledger.untold
    return Saved(last["round"] + 1, tuple(versions.values()), last["agenda"], clients, tardy, late, *known)


@functools.lru_cache(maxsize=50_000)
def _read(run: str, epoch: int, message: Message) -> wire.Envelope:
    """What the other side reads of a message without a payload: many are said again and again, in all histories."""
    return wire.decode([bytes(frame) for frame in wire.encode(wire.Envelope(run, epoch, message))])


@functools.lru_cache(maxsize=50_000)
def _check_heartbeat(run: str, epoch: int, round: int, step: int, state: str) -> None:
    """That the other side reads such a heartbeat as it was said."""
    said = Heartbeat(0.0, round, step, state)
    assert _read(run, epoch, said) == wire.Envelope(run, epoch, said)


@functools.lru_cache(maxsize=10_000)
def _trained(seed: int, layout: Layout, *, spoilt: bool) -> tuple[bytes, tuple[bytes, ...]]:
    """A random delta, and its chunks as they are encoded. Processes have the same names in all histories."""
    delta = np.random.default_rng(seed).standard_normal(layout.numel, np.float32)
    if spoilt:
        delta[layout.numel // 2] = np.nan
    chunks = [bytes(layout.codec.encode(delta[layout.part(index)])) for index in range(layout.count)]
    return delta.tobytes(), tuple(chunks)


@functools.lru_cache(maxsize=10_000)
def _decoded(codec: CodecName, chunk: bytes, numel: int) -> Vector:
    """A chunk is read by each process that it comes to."""
    values = codec_of(codec).decode(memoryview(chunk), numel)
    values.flags.writeable = False
    return values


@functools.cache
def _chance(whose: str) -> float:
    """From 0 to 1, the same whenever it is asked for."""
    return random.Random(whose).random()


@functools.cache
def _config(text: str) -> settings.Config:
    return settings.from_dict(json.loads(text))


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
    policy: dict[str, Any] | None = None,
    heartbeat_s: float = 1.0,
    **top: Any,
) -> Any:
    """A config with short times: timeout 6 s, resend 3 s; chunks of 1024 bytes, two of them a window.

    A round takes one step, and round t trains block t modulo 4, unless `solver` or `schedule` says otherwise; it has no
    grace, unless `policy`, which is more of `round`, says so.
    """
    times = {"heartbeat_s": heartbeat_s, "timeout_s": 6.0, "resend_s": 3.0}
    network = {"chunk_bytes": 1024, "window_bytes": window, **times}
    round = {"clients": clients, "quorum": quorum, "fraction": fraction, "deadline_s": deadline_s, "grace": False}
    usual = {"solver": {"steps": 1}, "schedule": {"order": "cyclic"}}
    tree = {"rounds": rounds, "network": network, "round": round | (policy or {}), **usual, **top}
    return settings.from_dict(tree)


@dataclass(frozen=True)
class Incident:
    """Something that befalls `victim` (a worker's name, or "broker") at `at` and is over after `lasts` seconds.

    kind: `freeze` (SIGSTOP and SIGCONT: what comes meanwhile is handled late), `cut` (what is sent meanwhile, in either
    direction, is lost), `disk` (the broker's refuses whatever is written) or `kill` (the process is gone; after `lasts`
    another one comes under the name, if `returns`, or if no round is committed yet: no run begins without all of its
    clients).
    kept: a worker comes back with what it has kept. point: of the broker, the first passage of which from `at` on kills
    it; see `POINTS`.
    """

    kind: str
    victim: str
    at: float
    lasts: float
    returns: bool = True
    kept: bool = False
    point: str = ""


ECHO_S = 10.0
PATIENCE_S = 120.0

POINTS = ("before the block", "before the entry", "before the announcement", "amid the announcement")
"""Moments of a commit: nothing is durable; only the block is; the entry is too; some have heard of it."""


@dataclass(frozen=True)
class Faults:
    """What links do. delay_s: fewest and most seconds of one message. ordered: as on one connection, no overtaking.

    echo: how often a copy of a message comes once more, up to `ECHO_S` later; but of a Hello, which would be taken for
    another process, and of a Join. jumps: at which moments the wall clock, `time.time`, leaps by how many seconds.
    """

    loss: float = 0.0
    duplication: float = 0.0
    echo: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.02)
    ordered: bool = True
    incidents: tuple[Incident, ...] = ()
    jumps: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Habits:
    """How a client trains. seconds: of a round, drawn from a range. diverges: rounds withheld. spoils: with a NaN.

    stalls: rounds of whose contribution only the first chunk is ever sent, though the client is heard.

    astray: how often, from 0 to 1, its guard makes it wait for all that is in flight before it trains.
    """

    seconds: tuple[float, float] = (0.5, 1.5)
    diverges: frozenset[int] = frozenset()
    spoils: frozenset[int] = frozenset()
    stalls: frozenset[int] = frozenset()
    astray: float = 0.0
    joins_at: float = 0.0
    rows: int = 10
    base: str = BASE


def part_of(label: str, round: int) -> tuple[str, int]:
    """Whose a part of a round's mean is, and for which round it was made."""
    client, late, made_for = label.partition("@")
    return client, int(made_for) if late else round


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
    token: str = ""  # of the process


@dataclass
class Process:
    """One process of a client: the participant, the round loop, and a model that holds only what has landed."""

    network: Network
    name: str
    token: str
    habits: Habits
    participant: Participant
    kept: worker.Kept | None = None  # by an earlier process
    told: dict[int, set[Turn]] = field(default_factory=dict)  # by round, what was said of it to this process
    told_through: int = 0  # the first round that it does not know to be committed
    position: int = -1  # the round that the loop is at
    given: int = -1  # the last round committed before the newest start
    busy: bool = False
    dead: bool = False
    armed: float | None = None  # for when its timer is set
    started: worker.Started | None = None
    buffers: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)  # by round and attempt: chunks, in order
    arrivals: list[tuple[worker.Arrived, list[bytes]]] = field(default_factory=list)
    blocks: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # by block: its round and bytes
    arrived: set[int] = field(default_factory=set)
    trained: list[int] = field(default_factory=list)
    uploaded: list[int] = field(default_factory=list)
    dismissed: dict[int, str] = field(default_factory=dict)
    deferred: list[int] = field(default_factory=list)
    settled: dict[int, tuple[int, str]] = field(default_factory=dict)  # by round: in which it counted late, or why not
    notices: list[str] = field(default_factory=list)
    gone: worker.Gone | None = None
    stands_for: tuple[int, State] = (-1, State.CALLING)  # what it has last said that it waits for
    speaks_to: int = 0  # the epoch of the newest broker that it has spoken to as such
    heard_at: float = 0.0  # when that one's newest heartbeat came
    in_touch: bool = False  # it has heard anything at all
    heard_of: set[int] = field(default_factory=set)  # rounds of which a commit has come
    maskers: dict[int, Masker] = field(default_factory=dict)  # by round
    plain: dict[int, Made] = field(default_factory=dict)  # by round, contributions that are to be masked

    @functools.cached_property
    def peer(self) -> bytes:
        return bytes.fromhex(self.token)

    def handle(self, event: worker.Event) -> None:
        """Give the participant an event, perform its effects, and let the loop go on as far as it can."""
        network, moves = self.network, True
        if not isinstance(event, worker.Received):
            effects = self.participant.handle(event, network.now)
        else:
            epoch, message = event.envelope.epoch, event.envelope.message
            if isinstance(message, Commit):
                self.heard_of.add(message.round)
            effects = self.participant.handle(event, network.now)
            self.in_touch = True
            assert not effects or epoch >= self.speaks_to, "what an earlier broker has said is taken"
            if isinstance(message, Heartbeat):
                moves = False  # it lets nobody go on who was waiting
                if epoch == self.speaks_to:
                    self.heard_at = network.now
        for effect in effects:
            match effect:
                case worker.Send():
                    self.speaks_to = max(self.speaks_to, effect.envelope.epoch)
                    network.carry(self, effect.envelope, up=True)
                case worker.Fetch(round, index, stored):
                    upload = self.participant._contributions._uploads[round]
                    assert index * upload.payload.chunk_bytes >= upload.outgoing.sent, "read back, and sent already"
                    read = worker.Fetched(round, index, Encoded(memoryview(stored.again())))
                    network.after(0.01, partial(self.handle, read), self)
                case worker.Prepare(config, _):
                    assert _config(config) == network.config
                    network.after(0.5, lambda: self.handle(network.prepared(self)), self)
                case worker.Started():
                    self.started = effect
                case worker.Mask(round, masker):
                    self.maskers.pop(round, None)
                    if masker is not None:
                        self.maskers[round] = masker
                        self._mask(round)
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
                case worker.Deferred(round):
                    assert round not in self.deferred, "told twice"
                    self.deferred.append(round)
                case worker.Settled(round, into, reason):
                    assert round not in self.settled, "told twice"
                    assert into < 0 or self.network.counted.get((self.name, round)) == into
                    self.settled[round] = into, reason
                case worker.Notice(text):
                    self.notices.append(text)
                case worker.Gone(_, reason):
                    if reason.startswith("nothing heard"):
                        assert network.now >= self.heard_at + PATIENCE_S, "the broker is given up, though it was heard"
                    self.gone = effect
        told = self.participant.told
        assert told >= self.told_through, "the global version goes back"
        self.told_through = told
        if moves:
            self.loop()
        network.arm(self)

    def left(self) -> worker.Kept:
        """What is on its disk when it dies: blocks that have landed, and contributions that were complete.

        It goes on from the first round of which that is not so.
        """
        versions = tuple(self.blocks[b][0] + 1 if b in self.blocks else 0 for b in range(len(SIZES)))
        contributions = self.participant._contributions
        uploads = contributions._uploads
        position = min([n for n, each in uploads.items() if not each.payload.complete], default=contributions.position)
        held = tuple(worker.Held(each.offer, each.payload) for n, each in uploads.items() if n < position)
        held = () if self.network.config.secure.enabled else held
        return worker.Kept(RUN, versions, position, held)

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
        if self.position < 0:
            return
        if not self.participant.may_train(target + config.together - 1):
            self.stand_still(target + config.together - 1)
            return
        turn = None if done else self.network.turn(self)
        if turn is not None and turn.trains and self._astray():
            target += config.delay
            if not self.participant.may_train(target):
                self.stand_still(target)
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

    def stand_still(self, wanted: int) -> None:
        """Wait for what `wanted` builds on; said once."""
        config = self.network.config
        round = min(wanted, config.rounds + config.in_flight) - config.in_flight - 1
        if self.stands_for != (round, self.participant.state):
            self.stands_for = round, self.participant.state
            for effect in self.participant.handle(worker.Wait(round), self.network.now):
                assert isinstance(effect, worker.Send)
                self.network.carry(self, effect.envelope, up=True)

    def _astray(self) -> bool:
        """Whether the guard holds back the round that the loop is at; the same whenever it is asked."""
        return _chance(f"{self.name}/{self.position}") < self.habits.astray

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
                    [_decoded(layout.codec.name, c, p.stop - p.start) for c, p in zip(chunks, parts, strict=True)]
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
        if self.network.config.secure.enabled:
            self.plain[round] = made
            self.handle(worker.Contribute(round, block, made.weight, made.steps, made.loss))
            self._mask(round)
            return
        # Encoded one after the other on a thread of the process, while it goes on.
        for number, chunk in enumerate(made.chunks[:1] if round in self.habits.stalls else made.chunks):
            event = worker.Ready(round, Encoded(memoryview(chunk)))
            self.network.after(0.01 * (1 + number), lambda event=event: self.handle(event), self)
        if round not in self.habits.stalls and _chance(f"spilled/{self.name}/{round}") < 0.5:
            on_disk = worker.OnDisk(round, tuple(partial(memoryview, chunk) for chunk in made.chunks))
            self.network.after(0.01 * (2 + len(made.chunks)), partial(self.handle, on_disk), self)
        self.handle(worker.Contribute(round, block, made.weight, made.steps, made.loss))

    def _mask(self, round: int) -> None:
        """As `workers.masking_outbox`."""
        if round not in self.maskers or round not in self.plain:
            return
        made, masker = self.plain[round], self.maskers[round]
        values = np.frombuffer(made.values, np.float32)
        if (reason := masker.objection(values, made.weight)) is not None:
            self.network.after(0.0, lambda: self.handle(worker.Withdraw(round, reason)), self)
            return
        layout = Layout.up(self.network.config, values.size)

        def ready(index: int) -> None:
            if self.maskers.get(round) is masker:
                chunk = masker.mask(values[layout.part(index)], made.weight, index)
                assert bytes(chunk) not in made.values, "it is not masked"
                self.handle(worker.Ready(round, Encoded(chunk)))

        for number in range(1 if round in self.habits.stalls else layout.count):
            self.network.after(0.01 * (1 + number), lambda number=number: ready(number), self)


@dataclass
class Folder:
    """What the broker has made durable, as `BlockVersions` and `Journal` do. refuses: the disk, now. dies: the broker,
    before it writes a row."""

    refuses: Callable[[], bool]
    dies: Callable[[], bool]
    versions: dict[tuple[int, int], StoredBlock] = field(default_factory=dict)  # by block and round
    entries: list[str] = field(default_factory=list)  # JSON, of the rows

    def listed(self) -> dict[int, list[int]]:
        return {}  # what is superseded stays

    def writer(self, label: Label, numel: int, names: Sequence[str]) -> Writer:
        self.look()
        assert names[0] == BLOCK
        return Writer(self, label, numel, {name: [] for name in names})

    def save(self, label: Label, tensors: Mapping[str, Vector], entry: str) -> None:
        self.look()
        kept = {name: each.copy() for name, each in tensors.items()}
        self.versions[label.index, label.version - 1] = StoredBlock(label, kept, entry)

    def drop(self, index: int, version: int) -> None:
        """What is superseded stays: the ledger looks at it."""

    def look(self) -> None:
        if self.refuses():
            raise OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Writer:
    folder: Folder
    label: Label
    numel: int
    parts: dict[str, list[Vector]]

    def write(self, parts: Mapping[str, Vector]) -> None:
        self.folder.look()
        for name, part in parts.items():
            self.parts[name].append(part.copy())

    def commit(self, entry: str) -> None:
        self.folder.look()
        tensors = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        assert {each.shape for each in tensors.values()} == {(self.numel,)}
        self.folder.versions[self.label.index, self.label.version - 1] = StoredBlock(self.label, tensors, entry)

    def abort(self) -> None:
        self.parts.clear()


class Died(Exception):
    """The broker, while it stored a round."""


class Broker:
    """One process of the broker: the coordinator, the model, and its threads, which do one thing after the other."""

    def __init__(self, config: settings.Config, manifest: Manifest, folder: Folder, epoch: int) -> None:
        self.epoch = epoch
        self.dead = False
        self.armed: float | None = None  # for when its timer is set
        self.folds: list[events.Fold] = []
        self.measures: list[events.Measure] = []
        self.busy_until = 0.0
        self.began: float | None = None  # when it handled its first event
        self.heard: dict[str, float] = {}  # by client: when it last took a message
        self._folder = folder
        zeros = [np.zeros(block.numel, np.float32) for block in manifest.blocks]
        self._blocks = GlobalBlocks(BaseModel(manifest, BASE, TOKENIZER, zeros), config)
        self._measurement = Measurement(config, manifest)
        self._store = BlockStore(folder, self, RUN, manifest.digest, 2)  # type: ignore[arg-type]
        entries = [entry_from_json(text) for text in folder.entries]
        for _, version in sorted(folder.versions.items(), key=lambda item: item[0][1]):
            entry = entry_from_json(version.entry)
            if entry.round == len(entries):  # its broker died before it wrote the row
                entries.append(entry)
                folder.entries.append(version.entry)
            self._blocks.restore(version)
        journal = [(e, folder.versions[e.block, e.round].values.tobytes() if e.attempt else None) for e in entries]
        self.coordinator = Coordinator(
            config, manifest, BASE, TOKENIZER, RUN, epoch, saved_of(journal, config.in_flight)
        )

    def append(self, row: Row) -> None:
        """As `Journal.append`. Raises Died."""
        if self._folder.dies():
            raise Died
        self._folder.look()
        self._folder.entries.append(entry_json(row.entry))

    def make(self, fold: events.Measure | events.Fold) -> events.Measured | events.Folded | events.Unfit | None:
        if isinstance(fold, events.Measure):
            return self._measurement.take(fold)
        made = self._blocks.fold(fold)
        if isinstance(made, events.Unfit):
            return made
        self._store.write(fold.round, fold.attempt, fold.block, made.numel, made.parts)
        return made.answer

    def keep(self, store: events.Store) -> events.Stored:
        """Raises OSError where the disk refuses, and Died."""
        tensors = self._blocks.tensors(store) if store.attempt else None
        self._store.commit(store, tensors)
        if tensors is None:
            return events.Stored(store.round, 0, None)
        self._blocks.settle(store)
        return events.Stored(store.round, store.attempt, tensors[BLOCK].data.cast("B"))


class Formula:
    """The global model by the formulas of `parablock.aggregation` and `parablock.feedback`, on whole vectors."""

    def __init__(self, config: settings.Config, manifest: Manifest) -> None:
        self._config = config
        self._x = [np.zeros(block.numel, np.float32) for block in manifest.blocks]
        self._state: dict[int, dict[str, Vector]] = {}
        self._residuals: dict[int, Vector] = {}

    def move(
        self,
        block: int,
        deltas: list[Vector],
        weights: list[Fraction],
        steps: list[int],
        factors: list[float],
        bad: int,
    ) -> bytes:
        """What the block becomes when these contributions are counted, in this order."""
        return self.apply(block, robust.aggregate(self._config.robust.rule, bad, deltas, weights, steps, factors))

    def apply(self, block: int, mean: Vector) -> bytes:
        """What the block becomes with this mean."""
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
        self,
        config: settings.Config,
        clients: dict[str, Habits],
        faults: Faults | None = None,
        seed: int = 0,
        sizes: Iterable[int] = SIZES,
    ) -> None:
        self.now = 0.0
        self.config = config
        self.rng = random.Random(seed)
        self.faults = faults or Faults()
        self.manifest = manifest_of(sizes)
        self.told: dict[tuple[str, int], tuple[int, Turn]] = {}  # by client and round, what which broker has said of it
        self.drawn: set[tuple[str, int]] = set()  # of these, whom any broker has asked to train
        self.made_up = 0  # how often one that was not drawn was asked to train all the same
        self._schedule = Schedule.of(config, len(self.manifest.blocks))
        self._importance = ImportanceOrder(len(self.manifest.blocks), config.in_flight)
        self._blocks_by_round = [self._importance.next() for _ in range(config.in_flight + 1)]
        self.over: events.Over | None = None
        self.over_at = 0.0
        self._short_since = math.inf  # since when the quorum is missing, as this broker has said
        self._restarted_at = -math.inf
        self.processes: list[Process] = []
        self.retries = 0  # how often the disk was tried again
        self.crashed: list[str] = []  # the points at which the broker has died
        # The ledger: what has happened, by round.
        self.committed: list[Entry] = []  # as soon as it is durable
        self.values: list[bytes | None] = []  # what each round made of its block
        self._made_before: list[dict[int, int]] = [{}]  # by round: of each block the last round before it that made it
        self.counted: dict[tuple[str, int], int] = {}  # by client and round it was made for: in which it counted
        self.made: dict[tuple[str, int], list[Made]] = defaultdict(list)
        self.folder = Folder(
            lambda: bool(self._befalls("disk", "broker", self.now)), lambda: self._pass("before the entry")
        )
        self._formula = Formula(config, self.manifest)
        self._verdict: tuple[events.Measure, list[tuple[str, float]]] | None = None  # on the newest attempt
        self._chunks: dict[tuple[int, int, int, int], wire.Envelope] = {}  # sent down; by epoch, round, attempt, offset
        self._members: dict[int, dict[str, str]] = {}  # by round, of what is masked: tokens by client
        self.unmasked: dict[tuple[int, int], list[frozenset[tuple[str, str]]]] = defaultdict(list)  # by round and chunk
        self.notes: list[events.Note] = []
        self._noted = 0  # how many there were at the broker's newest restart
        self.starts: dict[str, list[Start]] = defaultdict(list)
        self.sent: list[Sent] = []
        self.broker = Broker(config, self.manifest, self.folder, 1)
        self._by_peer: dict[bytes, Process] = {}
        self._incidents: dict[tuple[str, str], list[Incident]] = defaultdict(list)
        for incident in self.faults.incidents:
            self._incidents[incident.kind, incident.victim].append(incident)
        self._traps = [incident for incident in self._incidents["kill", "broker"] if incident.point]
        self._crossed: dict[int, tuple[wire.Envelope, wire.Envelope]] = {}  # chunks before and after the codec, by id
        self._heap: list[tuple[float, int, Any, Callable[[], None]]] = []
        self._count = 0
        self._handled = 0  # events of the broker
        self._connection: dict[tuple[bytes, bool], float] = {}  # when the newest message of an ordered link arrives
        for name, habits in clients.items():
            self.after(habits.joins_at, lambda name=name, habits=habits: self.join(name, habits))
        for incident in self.faults.incidents:
            if incident.kind == "kill" and not incident.point:
                self.after(incident.at, lambda incident=incident: self._kill(incident))

    # The clock

    def after(self, seconds: float, act: Callable[[], None], whose: Any = None) -> None:
        """Do `act` later. whose: the process that does it, or "broker": whichever there is then; not done if that has
        died, late if it is frozen."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, whose, act))

    def run(self, until_s: float = 400.0) -> Network:
        """Go on until nothing is left to happen, or to a moment that a healthy run does not reach."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", self.wall_clock)
            self._run(until_s)
        return self

    def wall_clock(self) -> float:
        """Seconds since 1970, as far as the machines' clocks can tell."""
        return 1.8e9 + self.now + sum(by for at, by in self.faults.jumps if at <= self.now)

    def _run(self, until_s: float) -> None:
        frozen = {victim for kind, victim in self._incidents if kind == "freeze"}
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            due, _, whose, act = pop(heap)
            if due > self.now:
                self.now = due
            if isinstance(whose, Process):
                if whose.dead or whose.gone is not None:
                    continue
                victim = whose.name
            elif whose is not None:
                if self.broker.dead or (whose != "broker" and whose.dead):
                    continue
                victim = "broker"
            if whose is not None and victim in frozen and (thaws := self._thaws_at(victim)) > self.now:
                self._count += 1
                heapq.heappush(self._heap, (thaws, self._count, whose, act))
                continue
            act()

    def arm(self, whose: Process | Broker, *, ticked: bool = False) -> None:
        """Set the timer of a machine to its deadline."""
        if isinstance(whose, Process):
            due = whose.participant.deadline() if whose.gone is None else None
        else:
            due = whose.coordinator.deadline() if self.over is None else None
        assert not ticked or due is None or due > self.now, "a tick leaves something due: the process would spin"
        if due is not None and due != whose.armed:
            whose.armed = due
            self.after(max(due - self.now, 0.0), partial(self._tick, whose, due), whose)

    def _tick(self, whose: Process | Broker, due: float) -> None:
        if whose.armed != due:
            return  # set anew since
        whose.armed = None
        if isinstance(whose, Process):
            whose.handle(worker.Tick())
        else:
            self.handle(events.Tick())
        self.arm(whose, ticked=True)

    def _befalls(self, kind: str, victim: str, moment: float) -> list[Incident]:
        incidents = self._incidents.get((kind, victim))
        if not incidents:
            return []
        return [incident for incident in incidents if incident.at <= moment < incident.at + incident.lasts]

    def _thaws_at(self, victim: str) -> float:
        """When a victim can act again; freezes that overlap are one."""
        moment = self.now
        while freezes := self._befalls("freeze", victim, moment):
            moment = max(incident.at + incident.lasts for incident in freezes)
        return moment

    # The workers

    def join(self, name: str, habits: Habits | None = None, kept: worker.Kept | None = None) -> Process:
        """A new process, under a name that may have had one before, which may have kept something."""
        token = f"{len(self.processes) + 1:032x}"
        process = Process(self, name, token, habits or Habits(), Participant(name, token, PATIENCE_S, self.now), kept)
        if kept is not None:
            versions = enumerate(kept.versions)
            process.blocks = {b: (made - 1, self.values[made - 1] or b"") for b, made in versions if made}
        self.processes.append(process)
        self._by_peer[process.peer] = process
        process.handle(worker.Tick())
        return process

    def process(self, name: str) -> Process:
        """The newest process of a name."""
        return next(process for process in reversed(self.processes) if process.name == name)

    def prepared(self, process: Process) -> worker.Prepared:
        habits = process.habits
        return worker.Prepared(self.config, self.manifest, habits.base, TOKENIZER, habits.rows, process.kept)

    def _kill(self, incident: Incident) -> None:
        if incident.victim == "broker":
            self._kill_broker(incident)
            return
        for process in self.processes:
            if process.name == incident.victim and not process.dead and process.gone is None:
                process.dead = True
                if incident.returns or not self.committed:
                    self.after(incident.lasts, lambda process=process: self._return(process, incident))

    def _return(self, dead: Process, incident: Incident) -> None:
        if self.over is None:
            begun = dead.participant.state is State.TRAINING  # else there is nothing on its disk yet
            self.join(dead.name, dead.habits, dead.left() if incident.kept and begun else dead.kept)

    def _kill_broker(self, incident: Incident) -> None:
        if self.over is None and not self.broker.dead:
            self.broker.dead = True
            self.after(incident.lasts, self._restart)

    def _restart(self) -> None:
        """Another broker, from what is on the disk."""
        self.broker = Broker(self.config, self.manifest, self.folder, self.broker.epoch + 1)
        self._noted, self._short_since = len(self.notes), math.inf
        self._restarted_at = self.now
        self.handle(events.Tick())

    def begin_again(self) -> None:
        """Somebody starts all of a run that was stopped, the broker and each client, with what is on their disks."""
        assert self.over is not None
        assert not self.over.complete
        self.over = None
        self._restart()
        newest = {process.name: process for process in self.processes}
        for process in newest.values():
            begun = not process.dead and process.position >= 0
            self.join(process.name, process.habits, process.left() if begun else process.kept)
        for process in self.processes[: -len(newest)]:
            process.dead = True

    def _pass(self, point: str) -> bool:
        """The broker passes a point of a commit; whether it has died of that."""
        for incident in self._traps:
            if incident.point == point and self.now >= incident.at:
                self._traps.remove(incident)
                self.crashed.append(point)
                self._kill_broker(incident)
                return True
        return False

    def train(self, process: Process, round: int) -> Made:
        """What a process makes of a round: its own random delta, whatever its model holds."""
        assert not process.trained or round > process.trained[-1], "a round is trained twice"
        base = round // self.config.together * self.config.together - self.config.delay
        assert len(self.committed) >= base, "training is too far ahead"
        for block, number in self._made_before[max(base, 0)].items():
            assert process.blocks[block][0] >= number, f"round {number} has not landed"
        for made_by, values in process.blocks.values():
            assert values == self.values[made_by]
        process.trained.append(round)
        seed = zlib.crc32(f"{process.name} {process.token} {round}".encode())
        layout = Layout.up(self.config, self.manifest.blocks[self.block(round)].numel)
        values, chunks = _trained(seed, layout, spoilt=round in process.habits.spoils)
        fewest, most = self.config.solver.step_bounds
        steps = fewest + seed % (most - fewest + 1)
        made = Made(values, chunks, 1 + seed % 100, steps, float(seed % 7), process.token)
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
            assert turn in process.told[process.position]  # not the newest, where a Start is still on its way
        else:
            assert turn.trains
        return turn

    def _tell(self, process: Process, message: Start | Commit) -> None:
        if not self.config.announced:
            assert not message.blocks, "what follows from the settings is not said"
            assert not message.trains
            return
        first = message.next if isinstance(message, Start) else message.round + self.config.in_flight + 1
        for round, said in enumerate(zip(message.blocks, message.trains, strict=True), start=first):
            turn, key = Turn(*said), (process.name, round)
            epoch, told = self.told.get(key, (0, turn))
            assert turn.block == told.block == self.block(round)
            # Who has been away may have to make up for somebody who was drawn and is gone. That is not in the journal.
            assert turn.trains >= told.trains or epoch < self.broker.epoch
            self.made_up += turn.trains > told.trains
            process.told.setdefault(round, set()).add(turn)
            self.told[key] = self.broker.epoch, turn
            if turn.trains:
                self.drawn.add(key)

    def layout(self, arrived: worker.Arrived) -> Layout:
        return Layout.down(self.config, self.manifest.blocks[arrived.block].numel, arrived.attempt)

    def check_arrival(self, process: Process, arrived: worker.Arrived, chunks: list[bytes]) -> None:
        assert arrived.round in process.heard_of, "it has landed before it was said to count"
        commit = self.committed[arrived.round]
        assert arrived.round not in process.arrived, "a round has arrived twice"
        process.arrived.add(arrived.round)
        assert arrived.block == commit.block
        assert arrived.contributors == len(commit.contributors) + len(commit.folded_late)
        assert arrived.counted == (process.name in commit.contributors)
        if self.layout(arrived).codec.lossless:
            content = b"".join(chunks) if arrived.contributors else None
            assert content == self.values[arrived.round], "what arrived is not what was committed"

    # The link

    def carry(self, process: Process, envelope: wire.Envelope, *, up: bool) -> None:
        """Take a message across, if it gets across."""
        now, faults, rng = self.now, self.faults, self.rng
        self.sent.append(Sent(now, process.name, up, envelope.message))
        if (("cut", process.name) in self._incidents and self._befalls("cut", process.name, now)) or (
            rng.random() < faults.loss
        ):
            return
        crossed = self._through_codec(envelope)
        if faults.echo and rng.random() < faults.echo and not isinstance(envelope.message, Hello | Join):
            self._deliver(process, crossed, now + rng.uniform(0.0, ECHO_S), up=up)
        soonest, latest = faults.delay_s
        for _ in range(2 if rng.random() < faults.duplication else 1):
            arrives = now + (soonest + (latest - soonest) * rng.random())
            if faults.ordered:
                link = process.peer, up
                arrives = self._connection[link] = max(arrives, self._connection.get(link, 0.0))
            self._deliver(process, crossed, arrives, up=up)

    def _deliver(self, process: Process, envelope: wire.Envelope, arrives: float, *, up: bool) -> None:
        later = arrives - self.now
        if up:
            self.after(later, partial(self.handle, events.Received(process.peer, envelope)), "broker")
        else:
            self.after(later, partial(process.handle, worker.Received(envelope)), process)

    def _through_codec(self, envelope: wire.Envelope) -> wire.Envelope:
        """What the other side reads. Each message is encoded and decoded once, however often it is sent; of a
        heartbeat, of which no two are alike, all but the sender's clock, which goes across as it is."""
        message = envelope.message
        if isinstance(message, Heartbeat):
            _check_heartbeat(envelope.run, envelope.epoch, message.round, message.step, message.state)
            return envelope
        if envelope.payload is None:
            return _read(envelope.run, envelope.epoch, message)
        crossed = self._crossed.get(id(envelope))
        if crossed is None:
            crossed = envelope, wire.decode([bytes(frame) for frame in wire.encode(envelope)])
            self._crossed[id(envelope)] = crossed
        return crossed[1]

    # The broker

    @property
    def coordinator(self) -> Coordinator:
        """The present broker's, or that of the one that has died last."""
        return self.broker.coordinator

    def handle(self, event: events.Event) -> None:
        if self.over is not None or self.broker.dead:
            return
        coordinator = self.broker.coordinator
        effects = self._given(coordinator, event)
        for number, effect in enumerate(effects):
            match effect:
                case events.Send():
                    self._send(self._by_peer[effect.peer], effect.envelope)
                    if number and isinstance(effect.envelope.message, Commit) and self._pass("amid the announcement"):
                        return
                case events.Measure():
                    self._check_work(effect, self.broker.measures)
                    self._execute(lambda measure=effect: self._work(measure))
                case events.Fold():
                    self._check_work(effect, self.broker.folds)
                    if self.config.measured:
                        self._check_verdict(effect)
                    self._execute(lambda fold=effect: self._work(fold))
                case events.Store():
                    assert effect.round == len(self.committed), "rounds are stored in order, each once"
                    self._execute(lambda store=effect: self._keep(store))
                case events.Committed():
                    assert effect.round == len(self.committed) - 1
                    self._check_committed(effect)
                case events.Note():
                    if effect.kind == "lost":
                        self._check_lost(effect)
                    elif effect.kind == "quorum" and "rounds wait" in effect.text:
                        self._short_since = self.now
                    self.notes.append(effect)
                case events.Over():
                    self.over, self.over_at = effect, self.now
                    if effect.reason.endswith("the run stops (round.quorum_lost)"):
                        self._check_stop()
        # Between the two it is durable, and the coordinator does not know yet.
        assert len(self.committed) - 1 <= coordinator.next_round <= len(self.committed)
        self._handled += 1
        if self._handled % 8 == 0 and self.over is None:  # it takes as long as all the rest
            due, latest = coordinator.deadline(), self._latest_deadline()
            assert latest is None or (due is not None and due <= latest), "a tick comes too late"
            self._check_under_way()
        self.arm(self.broker)

    def _given(self, coordinator: Coordinator, event: events.Event) -> list[events.Effect]:
        """What the coordinator wants done about an event; note who is heard by it."""
        broker = self.broker
        if broker.began is None:
            broker.began = self.now
        if not isinstance(event, events.Received):
            return coordinator.handle(event, self.now)
        old = event.envelope.epoch != broker.epoch and not isinstance(event.envelope.message, Hello)
        session = coordinator._roster.get(event.peer) if old else None
        heard_at = session.heard_at if session is not None else 0.0
        effects = coordinator.handle(event, self.now)
        assert session is None or session.heard_at == heard_at, "what was said to an earlier broker is taken"
        answered = refused = False
        for effect in effects:
            if isinstance(effect, events.Send) and effect.peer == event.peer:
                answered = True
                refused = refused or isinstance(effect.envelope.message, (Rejoin, Goodbye, Refused))
        assert answered or not isinstance(event.envelope.message, Hello), "a call is not answered"
        if not refused:
            broker.heard[self._by_peer[event.peer].name] = self.now
        return effects

    def _check_stop(self) -> None:
        """The run ends before its end: too few are there, and have been for as long as is said."""
        policy, timeout_s = self.config.round, self.config.network.timeout_s
        assert policy.quorum_lost == "stop"
        assert self.now >= self._short_since + policy.quorum_lost_s, "it was not waited for"
        assert self._short_since >= self._restarted_at + timeout_s, "nobody had the time to come back"
        there = {
            process.name
            for process in self.processes
            if not process.dead and process.participant.state is State.TRAINING
            if process.speaks_to == self.broker.epoch and self.broker.heard[process.name] > self.now - timeout_s
        }
        # A Hello that was overtaken ends a session of which its worker thinks that it goes on.
        again = {note.client for note in self.notes[self._noted :] if note.kind in ("behind", "rejoining")}
        assert len(there - again) < self.config.quorum, "enough are there"

    def _check_lost(self, note: events.Note) -> None:
        broker, timeout_s = self.broker, self.config.network.timeout_s
        assert broker.began is not None
        since = broker.began if note.text.startswith("not back") else broker.heard[note.client]
        assert self.now >= since + timeout_s, f"{note.client} is given up, though it was heard"

    def _send(self, process: Process, envelope: wire.Envelope) -> None:
        message = envelope.message
        if isinstance(message, Chunk):
            key = (envelope.epoch, message.round, message.attempt, message.offset)
            assert self._chunks.setdefault(key, envelope) is envelope, "a chunk was encoded twice"
        elif isinstance(message, Start):
            self._tell(process, message)
            self._check_roster()
            self.starts[process.name].append(message)
        elif isinstance(message, Commit):
            assert message.round < len(self.committed), "announced before it was durable"
            self._tell(process, message)
        self.carry(process, envelope, up=False)

    def _check_roster(self) -> None:
        joined = [session.name for session in self.coordinator._roster if session.state is not SessionState.GREETED]
        assert len(joined) == len(set(joined)), "two sessions under one name"

    def _check_under_way(self) -> None:
        network = self.config.network
        most = len(self.manifest.blocks) + self.config.in_flight + 2  # one of them on a mere guess who will count
        for session in self.coordinator._roster:
            under_way = sum([download.outgoing.under_way for download in session.downloads.values()])
            assert under_way <= network.window_bytes + network.chunk_bytes, "more than a window is under way"
            assert len(session.downloads) <= most, "more blocks wait for a link than there are"

    def _latest_deadline(self) -> float | None:
        """When the coordinator must look again at the latest, of all that it waits for."""
        coordinator, network = self.coordinator, self.config.network
        latest = [session.heard_at + network.timeout_s for session in coordinator._roster]
        for session in coordinator._roster:
            if session.downloads:
                waited = min([download.progress_at for download in session.downloads.values()])
                latest.append(waited + network.resend_s)
        until = coordinator._admission._expected_until
        if coordinator._roster.expected and until is not None:
            latest.append(until)
        closes = coordinator._collection.deadline(self.now)
        return min(latest if closes is None else [*latest, closes], default=None)

    def _work(self, asked: events.Measure | events.Fold) -> None:
        answer = self.broker.make(asked)
        if answer is not None:
            self.handle(answer)

    def _check_work(self, fold: events.Measure | events.Fold, folds: list[Any]) -> None:
        """What the fold's thread is asked for. folds: what it was asked for before, of the same kind."""
        masked = isinstance(fold, events.Fold) and fold.unmasking is not None
        parts = [part_of(contribution.client, fold.round) for contribution in fold.contributions]
        assert fold.round == len(self.committed), "folding out of order"
        assert fold.block == self.block(fold.round)
        own, late = ([name for name, made_for in parts if (made_for == fold.round) is own] for own in (True, False))
        assert own, "a late one is no mean by itself"
        assert [name for name, _ in parts] == own + late
        for names in (own, late):
            assert names == sorted(set(names)), "the fold has each client once, in roster order"
        for contribution, (name, made_for) in zip(fold.contributions, parts, strict=True):
            visits = [number for number in range(made_for, fold.round) if self.block(number) == fold.block]
            assert contribution.missed == len(visits)
            assert made_for == fold.round or visits[0] == made_for, "of another block"
            assert (name, made_for) not in self.counted, "counted twice"
            assert min(start.round for start in self.starts[name]) <= made_for, "no member"
            if self.config.announced:
                assert (name, made_for) in self.drawn, "not drawn for this round"
            made = self.made[name, made_for]
            if masked:
                continue  # what it is nobody can see; `_expected` has what it adds up to
            sent = [(m.chunks[fold.index], m.weight, m.steps) for m in made]
            counted = (bytes(contribution.payload), contribution.weight, contribution.steps)
            assert counted in sent, "a mixed contribution"
        if folds and (folds[-1].round, folds[-1].attempt) == (fold.round, fold.attempt):
            before = folds[-1]
            assert fold.index == before.index + 1, "the chunks of an attempt are folded in order, each once"
            assert fold.contributions[0].client == before.contributions[0].client or masked
            earlier = [part_of(contribution.client, fold.round) for contribution in before.contributions]
            assert parts == earlier or (masked and set(parts) < set(earlier))
        else:
            assert fold.index == 0, "an attempt begins with the first chunk"
        folds.append(fold)
        if masked:
            self._unmasked(fold)

    def _check_bad(self, round: int, asked: Sequence[Contribution], bad: int) -> None:
        """That a rule bears as many bad ones among these as there may still be: all that the settings say, but for
        those that have shown it by a NaN."""
        rule = self.config.robust
        spoilt = {p.name for p in self.processes if round in p.habits.spoils} - {each.client for each in asked}
        assert rule.bad >= bad >= max(rule.bad - len(spoilt), 0)
        assert len(asked) >= robust.fewest(rule.rule, bad)

    def _check_verdict(self, fold: events.Fold) -> None:
        """Who is folded, and how much of each."""
        last = self.broker.measures[-1]
        assert (last.round, last.attempt) == (fold.round, fold.attempt), "folded before it was measured"
        if self._verdict is None or self._verdict[0] is not last:
            self._verdict = last, self._verdict_on(last)
        verdict = self._verdict[1]
        assert [each.client for each in fold.contributions] == [name for name, _ in verdict]
        for each, (_, factor) in zip(fold.contributions, verdict, strict=True):
            assert math.isclose(each.factor, factor, rel_tol=1e-6)

    def _verdict_on(self, last: events.Measure) -> list[tuple[str, float]]:
        """By the rule, from whole vectors. last: the last chunk that was measured."""
        rule = self.config.robust
        deltas = self._whole(self.broker.measures, last)
        norms = [robust_reference.norm(delta) for delta in deltas]
        limit = rule.clip or (rule.clip_ratio * sorted(norms)[(len(norms) - 1) // 2] if rule.clip_ratio else np.inf)
        factors = [min(1.0, limit / norm) if norm else 1.0 for norm in norms]
        chosen = list(range(len(deltas)))
        if rule.by_distance:
            cut = [delta * np.float64(factor) for delta, factor in zip(deltas, factors, strict=True)]
            chosen = robust_reference.krum(cut, last.bad, rule.count(len(cut), last.bad))
        names = [contribution.client for contribution in last.contributions]
        return [(names[place], factors[place]) for place in chosen]

    def _keep(self, store: events.Store) -> None:
        """On the broker's disk thread. A version that has its name is committed, as a restart finds it."""
        if self._pass("before the block"):
            return
        stored = None
        try:
            stored = self.broker.keep(store)
        except OSError:
            self._again(lambda: self._keep(store))
        except Died:
            pass
        named = (store.block, store.round) in self.folder.versions
        durable = named if store.attempt else len(self.folder.entries) > store.round
        if durable and len(self.committed) == store.round:
            self._commit(store)
        if stored is not None and not self._pass("before the announcement"):
            self._execute(lambda: self.handle(stored))

    def _again(self, act: Callable[[], None]) -> None:
        """The disk has refused: try it later."""
        self.retries += 1
        self.after(1.0, act, self.broker)

    def _execute(self, act: Callable[[], None]) -> None:
        """On a thread of the broker: one thing after the other, each taking a while."""
        broker = self.broker
        broker.busy_until = max(broker.busy_until, self.now) + self.rng.uniform(0.0, 0.1)
        self.after(broker.busy_until - self.now, act, broker)

    def _commit(self, store: events.Store) -> None:
        """A round is durable, and so is what comes in_flight + 1 rounds later."""
        entry, values = store.entry, None
        assert entry.round == len(self.committed), "rounds are committed in order, each once"
        assert (entry.block, entry.attempt) == (store.block, store.attempt)
        assert bool(entry.contributors) == bool(entry.attempt)
        if entry.attempt:
            fold = self.broker.folds[-1]
            assert (fold.round, fold.attempt) == (entry.round, entry.attempt)
            counted = [(each.client, each.weight, each.steps) for each in fold.contributions]
            own = list(zip(entry.contributors, entry.weights, entry.steps, strict=True))
            assert counted[: len(own)] == own
            assert tuple(client for client, *_ in counted) == entry.counted
            assert entry.clipped == tuple(each.client for each in fold.contributions if each.factor < 1.0)
            asked = self.broker.measures[-1].contributions if self.config.measured else fold.contributions
            assert set(entry.left_out) == {each.client for each in asked} - set(entry.counted)
            self._check_bad(entry.round, asked, fold.bad)
            self.counted.update((part_of(part, entry.round), entry.round) for part in entry.counted)
            values = self.folder.versions[entry.block, entry.round].values.tobytes()
            before = self._formula.content(entry.block)
            assert self._expected(fold) == values, "what was made is not what the formulas say"
            if self._schedule is None:
                rms = float(np.sqrt(np.mean(np.square(self._formula.content(entry.block) - before))))
                assert entry.moved == pytest.approx(rms, rel=1e-3)
                rate = learning_rate(self.config.solver, entry.round, self.config.rounds)
                self._importance.moved(entry.block, entry.moved / rate)
        if self._schedule is None:
            self._blocks_by_round.append(self._importance.next())
        self.committed.append(entry)
        self.values.append(values)
        self._made_before.append(self._made_before[-1] | ({} if values is None else {entry.block: entry.round}))

    def _check_committed(self, said: events.Committed) -> None:
        entry = self.committed[said.round]
        assert (said.block, said.contributors, said.late) == (entry.block, entry.contributors, entry.late)
        assert (said.loss, said.reason, said.folded_late) == (entry.loss, entry.reason, entry.folded_late)
        assert said.bytes_up == entry.bytes_up
        assert said.bytes_down == entry.bytes_down

    def _expected(self, last: events.Fold) -> bytes:
        """What the formulas make of the contributions of an attempt, of which `last` was the last chunk."""
        folds = self.broker.folds[-1 - last.index :]
        if last.unmasking is not None:
            return self._formula.apply(last.block, np.concatenate([self._plain_mean(fold) for fold in folds]))
        deltas = self._whole(self.broker.folds, last)
        decay = self.config.round.late_decay
        weights = [c.weight * Fraction(decay) ** c.missed if c.missed else c.weight for c in last.contributions]
        steps = [contribution.steps for contribution in last.contributions]
        factors = [contribution.factor for contribution in last.contributions]
        return self._formula.move(last.block, deltas, weights, steps, factors, last.bad)

    def _whole(self, asked: list[Any], last: events.Measure | events.Fold) -> list[Vector]:
        """What the contributions of an attempt decode to, of which `last` was the last chunk that was asked for."""
        asked = asked[-1 - last.index :]
        layout = Layout.up(self.config, self.manifest.blocks[last.block].numel)
        assert len(asked) == layout.count, "not all of it was looked at"
        numels = [layout.part(index).stop - layout.part(index).start for index in range(layout.count)]
        chunks = zip(*(each.contributions for each in asked), strict=True)  # by client
        return [
            np.concatenate(
                [_decoded(layout.codec.name, bytes(c.payload), n) for c, n in zip(client, numels, strict=True)]
            )
            for client in chunks
        ]

    def _unmasked(self, fold: events.Fold) -> None:
        """Who has contributed to it by which process; and that it is in no other sum."""
        assert self.coordinator._collection._sums is not None
        members = self.coordinator._collection._sums._rounds[fold.round].sum.members
        self._members[fold.round] = dict(members)
        names = frozenset(contribution.client for contribution in fold.contributions)
        drawn = self.config.drawn(self.config.round.clients)
        assert len(names) >= max(self.config.secure.needed(drawn), self.config.secure.needed(len(members))) >= 2
        parts = frozenset((name, members[name]) for name in names)
        for others in self.unmasked[fold.round, fold.index]:
            assert parts == others or names.isdisjoint(name for name, _ in others), "a client is in two different sums"
        self.unmasked[fold.round, fold.index].append(parts)

    def _plain_mean(self, fold: events.Fold) -> Vector:
        """Of a chunk, by the whole numbers that the clients have masked."""
        members, most = self._members[fold.round], most_tokens(self.config)
        bits = fixed_point.exponent(len(members), self.config.secure.range)
        layout = Layout.up(self.config, self.manifest.blocks[fold.block].numel)
        part, total, tokens = layout.part(fold.index), 0, 0
        for contribution in fold.contributions:
            made = next(
                m for m in self.made[contribution.client, fold.round] if m.token == members[contribution.client]
            )
            assert (made.weight, made.steps) == (contribution.weight, contribution.steps)
            values = np.frombuffer(made.values, np.float32)[part].astype(np.float64)
            total = total + np.rint(values * (made.weight / most * 2.0**bits)).astype(np.int64)
            tokens += made.weight
        mean: Vector = (total * (most / tokens * 2.0**-bits)).astype(np.float32)
        return mean

    # The end

    def check_charged(self) -> None:
        """Whoever has sent any of a contribution is charged for its round, taken or not."""
        if not self.config.privacy.local:
            return
        for each in self.sent:
            if each.up and isinstance(each.message, Chunk):
                charged = self.committed[each.message.round].charged
                assert each.client in charged or EVERYBODY in charged, f"round {each.message.round}, by {each.client}"

    def check_stopped(self) -> None:
        """A run that was stopped is over for everybody."""
        for process in self.processes:
            if not process.dead:
                assert process.gone is not None, f"{process.name} is still {process.participant.state}"
                assert process.gone.end is End.LOST, process.gone

    def check_ended(self) -> None:
        """Everything has ended well: all rounds committed, every live client drained and gone with the whole model."""
        state = f"round {self.coordinator.next_round}, {self.coordinator.phase}, {self.coordinator.clients}"
        assert self.coordinator.phase is Phase.OVER, f"the run has not ended: {state}"
        assert self.over is not None
        assert self.over.complete
        assert len(self.committed) == self.config.rounds
        self.check_charged()
        latest = {commit.block: commit.round for commit in self.committed if commit.contributors}
        for process in self.processes:
            if process.dead:
                continue
            assert process.gone is not None, f"{process.name} is still {process.participant.state}"
            # Or else it was killed while it left, which the broker has heard after it had come back.
            forgotten = {note.client for note in self.notes if note.kind in ("lost", "behind", "left")}
            if process.name not in {note.client for note in self.notes[self._noted :] if note.kind == "joined"}:
                forgotten.add(process.name)  # not heard since the broker's restart, which began again without it
            if process.gone.end is End.LOST and process.name in forgotten:
                assert self.over_at < self.now - 60.0 or not process.in_touch
                continue  # out of touch at the end, for so long that the broker went without it
            assert process.gone.end is End.DONE, process.gone
            assert {block: made for block, (made, _) in process.blocks.items()} == latest
            assert all(content == self.values[made] for made, content in process.blocks.values())
            for round, (into, reason) in process.settled.items():
                key = process.name, round
                others = len(self.made[key]) > 1  # then that of an earlier process of the client may have counted
                assert into >= 0 or others or key not in self.counted, f"round {round}: {reason}"
            assert not process.buffers, "what will not be completed is held for ever"
