"""One chaos run: the processes and their links, the plan performed on them, and everything checked as it goes.

After each of the broker's deaths its folder is copied before it comes back, so that what each death left is looked at
by itself. At the end comes what only the end can show.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import random
import shutil
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Literal

from bench import invariants, synthetic
from bench.chaos_plan import BROKER, Fault
from bench.exchange import ENVIRONMENT
from bench.invariants import Exit, Held
from bench.keyring import Keyring
from bench.link import Link
from bench.listener import Ear, Line
from bench.processes import ChildError
from bench.recoveries import Act
from bench.victims import Victim
from parablock import config as settings
from parablock.journal import Journal
from parablock.journal_rows import JournalError
from parablock.run_folder import ENDPOINT, RunFolder
from parablock.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from parablock.config import Config
    from parablock.saved import Entry

POLL_S = 0.02
PATIENCE_S = 60.0
"""Without a new line of any client for this long, the run stands still, which is wrong."""

Workers = Literal["light", "real"]

_LOW_PORTS = range(20_000, 32_000)
"""Below the ephemeral ones: while the broker is away, no connection of anybody's gets its port for its own end."""


@dataclass(frozen=True)
class Asked:
    """What to run. config: without `network.bind`. linked: clients that connect through a link that faults can reach;
    the others reach the broker itself, so that their sockets see it go. block_bytes, pause_s: of light clients."""

    faults: tuple[Fault, ...]
    config: Config
    clients: tuple[str, ...]
    linked: tuple[str, ...]
    workers: Workers
    blocks: int
    block_bytes: int
    pause_s: float


@dataclass
class Seen:
    """What came of it. wrong: every broken invariant, as a sentence. listening: by restart of the broker, seconds from
    its process's start until its endpoint was there."""

    wrong: list[str] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    listening_s: list[float] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=dict)
    rows_missing: int = 0
    """Committed rounds that metrics.jsonl does not have: a row is written when all have reported on its round."""
    verified: int = 0
    seconds: float = 0.0


def run(asked: Asked, folder: Path) -> Seen:
    """Perform the plan in `folder`, which exists and is empty. Raises ChildError where the broker does not begin."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        ordeal = _Ordeal(asked, folder, stack)
        ordeal.perform()
        ordeal.seen.seconds = time.monotonic() - began
    return ordeal.seen


class _Ordeal:
    def __init__(self, asked: Asked, folder: Path, stack: contextlib.ExitStack) -> None:
        self.seen = Seen(lines={client: [] for client in asked.clients})
        self._asked = asked
        self._folder = folder
        self._out = folder / "run"
        port = _free_port()
        config = _with_bind(asked.config, f"tcp://127.0.0.1:{port}")
        (folder / "config.toml").write_text(settings.to_toml(config), encoding="utf-8")
        self._config = config
        self._links = {client: stack.enter_context(Link(("127.0.0.1", port))) for client in asked.linked}
        self._ears = {client: Ear(folder / f"{client}.lines") for client in asked.clients}
        self._ring = Keyring(folder / "keys", asked.clients)
        self._broker = Victim(BROKER, self._broker_command, folder / "broker.log", ENVIRONMENT)
        self._victims = {BROKER: self._broker}
        for index, client in enumerate(asked.clients):
            command = partial(self._client_command, index, client, config.network.bind)
            self._victims[client] = Victim(client, command, folder / f"{client}.log", ENVIRONMENT)
        stack.callback(self._kill_all)
        self._checks = stack.enter_context(ThreadPoolExecutor(1, "verify"))
        self._verdicts: list[Future[list[str]]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._open: dict[int, tuple[Fault, float]] = {}  # faults that have begun and not ended
        self._exits: list[Exit] = []
        self._heard: dict[str, int] = dict.fromkeys(asked.clients, 0)  # lines that were held against the journal
        self._over = False
        self._committed = 0

    # The plan

    def perform(self) -> None:
        self._broker.start()
        self._begin()
        for client in self._asked.clients:
            self._victims[client].start()
        faults, after, moved_at = list(reversed(self._asked.faults)), 0.0, time.monotonic()
        while not self._finished():
            now = time.monotonic()
            moved_at = now if self._listen() else moved_at
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            if self._look() or self._stalled(now - moved_at) or self.seen.wrong:
                break
            if faults and self._committed >= faults[-1].rounds and self._victims[faults[-1].target].runs:
                after = after or now + faults[-1].delay_s
                if now >= after:
                    after = 0.0
                    self._strike(faults.pop())
            time.sleep(POLL_S)
        if faults and not self.seen.wrong:
            self.seen.wrong.append(f"the run ended before {len(faults)} of the faults: {self._committed} rounds")
        self._kill_all()
        self._end()

    def _begin(self) -> None:
        """Wait until the broker listens for the first time: before that there is no run to come back to."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self._out / ENDPOINT).exists():
            if self._broker.ended(complete=False) is not None or time.monotonic() > deadline:
                raise ChildError(f"the broker did not begin\n{self._broker.story()}")
            time.sleep(POLL_S)

    def _strike(self, fault: Fault) -> None:
        victim, now, key = self._victims[fault.target], time.monotonic(), next(self._order)
        self._open[key] = fault, now
        match fault.kind:
            case "kill":
                victim.kill()
                self._exits += filter(None, [victim.ended(complete=self._complete)])
                if victim is self._broker:
                    self._look_at_what_is_left()
                undo = victim.start
            case "stop":
                victim.stop()
                undo = victim.go_on
            case "cut":
                self._links[fault.target].reset()
                undo = _nothing
            case "stall":
                self._links[fault.target].stall()
                undo = self._links[fault.target].resume
        if fault.lasts_s:
            heapq.heappush(self._timers, (now + fault.lasts_s, next(self._order), partial(self._undo, key, undo)))
        else:
            self._undo(key, undo)

    def _undo(self, key: int, undo: Callable[[], None]) -> None:
        undo()
        fault, began = self._open.pop(key)
        self.seen.acts.append(Act(fault.kind, fault.target, began, time.monotonic()))

    # What is looked at on the way

    def _listen(self) -> bool:
        """Take in the clients' new lines; whether there were any."""
        any_new = False
        for client, ear in self._ears.items():
            for line in ear.read():
                any_new = True
                self.seen.lines[client].append(line)
                if line.what == "commit":
                    self._committed = max(self._committed, line.round + 1)
        return any_new

    def _look(self) -> bool:
        """Take in who has ended; whether somebody did who should not have."""
        for victim in self._victims.values():
            exit = victim.ended(complete=self._complete)
            if exit is not None:
                self._exits.append(exit)
                self._over = self._over or (victim is self._broker and exit.code == 0)
        wrong = list(invariants.exits(self._exits))
        if wrong:
            self.seen.wrong += [f"{each}\n{self._stories()}" for each in wrong]
        return bool(wrong)

    def _stalled(self, quiet_s: float) -> bool:
        if quiet_s < PATIENCE_S:
            return False
        self.seen.wrong.append(f"nothing moved for {quiet_s:.0f} s after {self._committed} rounds\n{self._stories()}")
        return True

    @property
    def _complete(self) -> bool:
        return self._committed >= self._config.rounds

    def _finished(self) -> bool:
        """Everybody has ended, and nobody is to be started again."""
        return self._over and not any(victim.runs for victim in self._victims.values()) and not self._timers

    def _look_at_what_is_left(self) -> None:
        """The broker is dead: check a copy of its folder, and hold what the clients know against it."""
        endpoint = self._out / ENDPOINT
        if len(self._broker.starts) > 1:
            wrote = time.monotonic() - (time.time() - endpoint.stat().st_mtime)
            if wrote >= self._broker.starts[-1]:
                self.seen.listening_s.append(wrote - self._broker.starts[-1])
        copy = self._folder / f"left-{len(self._broker.starts)}"
        shutil.copytree(self._out, copy)
        self._listen()
        self._hold_against(copy)
        self._verdicts.append(self._checks.submit(_verified, copy))  # which removes it

    def _hold_against(self, run: Path) -> None:
        try:
            entries, epochs = read_journal(run)
        except JournalError as error:
            self.seen.wrong.append(str(error))
            return
        found = [*invariants.history(entries), *invariants.unchanged(self.seen.entries, entries)]
        for client, lines in self.seen.lines.items():
            found += invariants.announced(client, lines[self._heard[client] :], entries)
            self._heard[client] = len(lines)
        self.seen.wrong += found
        self.seen.entries, self.seen.epochs = entries, epochs

    # The end

    def _end(self) -> None:
        self._listen()
        seen = self.seen
        seen.kills = {name: victim.kills for name, victim in self._victims.items()}
        self._hold_against(self._out)
        if not seen.wrong and len(seen.entries) != self._config.rounds:
            seen.wrong.append(f"the run has {len(seen.entries)} of its {self._config.rounds} rounds")
        seen.wrong += invariants.epochs_rise(seen.epochs)
        seen.wrong += invariants.given(seen.lines, seen.entries)
        for client, lines in seen.lines.items():
            seen.wrong += invariants.forward(client, lines)
            seen.wrong += invariants.agreed(client, lines, seen.entries)
        for verdict in self._verdicts:
            seen.wrong += verdict.result()
            seen.verified += 1
        seen.wrong += _verify(self._out)
        if self._over:
            seen.wrong += invariants.leftovers(self._folder)
        with RunFolder.open(self._out) as folder:
            rows = folder.read_metrics()
            seen.wrong += invariants.metrics_once(rows, seen.entries)
            seen.rows_missing = invariants.rows_missing(rows, seen.entries)
            if self._asked.workers == "light":
                seen.wrong += self._blocks(folder)

    def _blocks(self, folder: RunFolder) -> Iterator[str]:
        """The blocks on disk, and those that the clients hold, are what the journal's contributions fold to."""
        base = synthetic.base(folder.manifest()).values
        expected = invariants.folded(self._config, base, self.seen.entries, synthetic.update)
        stored = {
            index: Held(version - 1, values) for index, (version, values) in folder.load_blocks().items() if version
        }
        yield from invariants.same_blocks(stored, expected)
        for client in self._asked.clients if self._over else ():
            report = json.loads((self._folder / f"{client}.json").read_text(encoding="utf-8"))
            if report["clients"][0]["digest"] != invariants.digest(expected):
                yield f"{client} holds other blocks than the run has made"

    def _kill_all(self) -> None:
        for victim in self._victims.values():
            if victim.runs:
                victim.kill()
                self._exits += filter(None, [victim.ended(complete=self._complete)])

    def _stories(self) -> str:
        return "\n".join(victim.story() for victim in self._victims.values())

    # Commands

    def _broker_command(self, again: bool) -> Sequence[str]:
        place = ("--resume", str(self._out)) if again else (str(self._folder / "config.toml"), "--out", str(self._out))
        if self._asked.workers == "real":
            return (sys.executable, "-m", "broker", *place, *self._ring.broker)
        return (sys.executable, "-m", "bench.light_broker", *place, *self._ring.light, *self._model(),
                "--report", str(self._folder / "broker.json"))  # fmt: skip

    def _client_command(self, index: int, client: str, bind: str, _again: bool) -> Sequence[str]:
        link = self._links.get(client)
        endpoint = link.endpoint if link is not None else bind
        log, state = str(self._folder / f"{client}.lines"), str(self._folder / "state" / client)
        if self._asked.workers == "real":
            shard = f"{index}/{len(self._asked.clients)}"
            broker = self._ring.client(client, endpoint)
            rest = ("--name", client, "--shard", shard, "--device", "cpu", "--threads", "1", "--state", state)
            return (sys.executable, "-m", "bench.listening_worker", log, *broker, *rest)
        broker = ("--broker", endpoint, *self._ring.light)
        way = ("--first", str(index), "--varied", "--pause-s", str(self._asked.pause_s), "--state", state)
        report = str(self._folder / f"{client}.json")
        return (sys.executable, "-m", "bench.light", *broker, *way, *self._model(), "--log", log, "--report", report)

    def _model(self) -> tuple[str, ...]:
        return ("--blocks", str(self._asked.blocks), "--block-bytes", str(self._asked.block_bytes))


def read_journal(run: Path) -> tuple[list[Entry], list[int]]:
    """The entries, and the epochs of the broker's processes in the order of their beginning. Raises JournalError."""
    with Journal.open(run / "journal.sqlite", read_only=True) as journal:
        return list(journal.entries()), list(journal.incarnations)


def _verified(copy: Path) -> list[str]:
    """What `parablock verify` finds wrong in a copy, which goes unless it found something."""
    wrong = _verify(copy)
    if not wrong:
        shutil.rmtree(copy)
    return wrong


def _verify(run: Path) -> list[str]:
    with RunFolder.open(run) as folder:
        return [f"{run.name}: {problem.file}: {problem.text}" for check in verify(folder) for problem in check.problems]


def _free_port() -> int:
    """One that nobody listens at."""
    candidates = list(_LOW_PORTS)
    random.shuffle(candidates)
    for port in candidates:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                trial.bind(("127.0.0.1", port))
                return port
    raise OSError(f"no port from {_LOW_PORTS.start} to {_LOW_PORTS.stop - 1} is free")


def _with_bind(config: Config, bind: str) -> Config:
    tree = settings.to_dict(config)
    tree["network"]["bind"] = bind
    return settings.from_dict(tree)


def _nothing() -> None:
    pass
