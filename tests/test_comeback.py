"""A worker that is killed at any moment and comes back trains on, bit for bit, as one that was not.

The real round loop, trainer, outbox and keeper of one client, with a broker that is plain arithmetic. Every state of
its folder that a kill could leave is copied while an undisturbed run goes on, and a new worker begins from each.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import config as settings
from parablock import tensor_file
from parablock.agenda import Turn
from parablock.blocks import read_block, write_block
from parablock.layout import Layout
from parablock.participant_events import Arrived, SitOut, Started, Withhold
from workers.comeback import kept
from workers.inbox import Delivery
from workers.keeper import Keeper
from workers.lag import LoopLag
from workers.outbox import Outbox
from workers.releases import Releases
from workers.rounds import RoundLoop
from workers.setup import Local, Setup, prepare
from workers.state_folder import Identity, StateFolder
from workers.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt
    import torch

    from parablock.participant_events import Contribute, Event
    from parablock.staging import Incoming
    from parablock.tensor_file import Reader
    from parablock.transfer import Encoded
    from workers.outbox import Encoding, Leaving
    from workers.spill import Spillable
    from workers.state_folder import State

    Vector = npt.NDArray[np.float32]

ROUNDS = 7
MODES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "all that can be kept": {
        "codec": {"up": "int4"},
        "solver": {"state": "keep", "steps": 1, "batch_size": 1, "lr": 1e-3},
        "pipeline": {"max_miss": 0.9},
    },
    "two in flight": {"pipeline": {"max_in_flight": 2, "max_miss": 1.0}},
    "some rounds sat out, synchronous": {"mode": "fedbcd", "round": {"fraction": 0.5, "clients": 2}},
}


def config_of(**tables: Any) -> settings.Config:
    solver = {"steps": 1, "batch_size": 1, "lr": 1e-3}
    return settings.from_dict({"rounds": ROUNDS, "solver": solver, "round": {"clients": 2}, **tables})


def load(**tables: Any) -> tuple[Setup, list[torch.Tensor]]:
    """A model with rows, and what its blocks are before any round."""
    local = Local("c", "builtin", "", (0, 64), "", "cpu", 1, False)
    setup = prepare(json.dumps(settings.to_dict(config_of(**tables), shared_only=True)), local)
    return setup, [read_block(setup.model, block) for block in setup.manifest.blocks]


@pytest.fixture(scope="module")
def loaded() -> tuple[Setup, list[torch.Tensor]]:
    return load()


class Broker:
    """Adds half of the client's delta, and of what another client would have made, to each block.

    In rounds that the client sits out the other one is alone. contributions: by round, byte for byte. exact: what is
    contributed to a round for the second time has to be what it was the first; either way that one counts.
    """

    def __init__(self, base: list[torch.Tensor]) -> None:
        self.exact = True
        self.values = [values.numpy().copy() for values in base]
        self.contributions: dict[int, bytes] = {}
        self.made: dict[int, tuple[int, int, Vector]] = {}  # by round: the block, who made it before, its new content

    def commit(self, round: int, payload: bytes, delta: Vector | None) -> None:
        """A contribution, decoded; None: the client had none."""
        same = self.contributions.setdefault(round, payload) == payload
        assert same or not self.exact, f"round {round} was trained to another result"
        block = round % len(self.values)
        if round not in self.made:
            before = max((n for n, made in self.made.items() if made[0] == block), default=-1)
            assert round > before
            x = self.values[block]
            other = np.random.default_rng(round).standard_normal(x.size).astype(np.float32) * np.float32(2e-3)
            self.values[block] = x + (other if delta is None else np.float32(0.5) * (delta + other))
            self.made[round] = (block, before, self.values[block])

    def newest(self, next_round: int) -> dict[int, int]:
        """By block, the last round below `next_round` that has made it."""
        return {self.made[n][0]: n for n in sorted(self.made) if n < next_round}


class Link:
    """To that broker: whatever is contributed is committed at once, and comes back."""

    def __init__(self, setup: Setup, broker: Broker, state: State | None) -> None:
        self.participant = self
        self.config, self.setup, self.broker = setup.config, setup, broker
        self.started: Started | None = None
        self.uploads: dict[int, tuple[float, float]] = {}
        self.arrivals: deque[Delivery] = deque()
        residuals = None if state is None else state.residuals
        self.outbox = Outbox(setup.config, self.ready, self.unheard, self.unheard, self.fail, residuals)
        self.told = 0
        self.position = 0
        self.coming: dict[int, list[Encoded]] = {}
        self.pending: list[int] = []  # arrives after the start has been taken
        self.here: set[int] = set()
        self.withheld: list[int] = []
        self.changed = asyncio.Event()
        self.failure: BaseException | None = None

    def start(self, next_round: int, state: State | None) -> None:
        """The broker has committed all before `next_round`, and gets what was held of later rounds; or it has gone on
        beyond where the client was, which begins where nobody has to wait for it."""
        versions, held, self.position = (0,) * len(self.broker.values), {}, 0
        if state is not None:
            left = kept(state, self.config, self.setup.manifest, "run")
            versions, self.position = left.versions, max(left.position, 0)
            held = {of.offer.round: of.payload for of in left.held}
        newest = self.broker.newest(next_round).items()
        self.pending = sorted(n for block, n in newest if n + 1 > versions[block])
        self.here.update(set(range(next_round)) - set(self.pending))
        self.told = next_round
        passed = next_round > self.position
        first = min(next_round + self.config.in_flight + 1, ROUNDS) if passed else next_round
        self.started = Started(first, 2, next_round, tuple(self.pending))
        for round in range(next_round, first):
            self.deliver(round)
        for round in range(next_round, self.position):
            if self.trains(round):
                assert held[round].complete
                self.coming[round] = list(held[round].chunks)
                self.commit(round, b"".join(bytes(chunk.payload) for chunk in held[round].chunks))
            else:
                self.sit_out(round)

    def fail(self, error: BaseException) -> None:
        self.failure = error
        self.changed.set()

    def trains(self, round: int) -> bool:
        return self.config.round.fraction == 1.0 or round % 3 != 1

    def turn(self, round: int) -> Turn | None:
        return Turn(round % len(self.broker.values), self.trains(round)) if round < ROUNDS else None

    def may_train(self, round: int) -> bool:
        return not self.pending and all(n in self.here for n in range(min(round - self.config.in_flight, ROUNDS)))

    def wants(self, round: int) -> bool:
        return round >= self.told

    def handle(self, event: Event) -> None:
        if isinstance(event, SitOut):
            self.sit_out(event.round)
        elif isinstance(event, Withhold):
            self.withheld.append(event.round)
            self.deliver(event.round)

    def sit_out(self, round: int) -> None:
        self.broker.commit(round, b"", None)
        self.deliver(round)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                assert self.failure is None, self.failure
                if self.started is None and self.pending:
                    self.deliver(self.pending.pop(0))
                    continue
                self.changed.clear()
                await self.changed.wait()

    def contribute(self, contribution: Contribute, delta: Leaving) -> tuple[bool, Future[Encoding] | None]:
        self.coming[contribution.round] = []
        return True, self.outbox.put(contribution.round, contribution.block, delta)

    def stored(self, round: int, delta: Spillable, file: Reader) -> None:
        self.outbox.stored(round, delta, file)

    def ready(self, round: int, chunk: Encoded) -> None:
        chunks = self.coming[round]
        chunks.append(chunk)
        if len(chunks) == self.layout(round).count:
            self.commit(round, b"".join(bytes(each.payload) for each in chunks))

    def unheard(self, *_: Any) -> None:
        """What can be read back: everything that leaves is kept in memory here."""

    def layout(self, round: int) -> Layout:
        return Layout.up(self.config, self.setup.manifest.blocks[round % len(self.broker.values)].numel)

    def commit(self, round: int, payload: bytes) -> None:
        layout, parts = self.layout(round), []
        for index in range(layout.count):
            begin = index * layout.chunk_bytes
            part = memoryview(payload)[begin : begin + layout.chunk_nbytes(index)]
            parts.append(layout.codec.decode(part, layout.part(index).stop - layout.part(index).start))
        self.broker.commit(round, payload, np.concatenate(parts))
        self.deliver(round)

    def deliver(self, round: int) -> None:
        block, before, values = self.broker.made[round]
        incoming: Future[Incoming] = Future()
        buffer = self.setup.staging.buffer(values.size)
        buffer[:] = values
        incoming.set_result(self.setup.staging.bring(buffer))
        counted = self.trains(round)
        arrived = Arrived(round, block, 1, before, 1 + counted, counted, 0.0, 1.0)
        self.arrivals.append(Delivery(arrived, incoming, change=False))
        self.here.add(round)
        self.changed.set()


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class World:
    """Runs of one client in one setting, each from its folder to the end."""

    def __init__(self, loaded: tuple[Setup, list[torch.Tensor]], tables: dict[str, Any]) -> None:
        setup, self.base = loaded
        self.setup = dataclasses.replace(setup, config=config_of(**tables))
        self.broker = Broker(self.base)
        self.link: Link | None = None  # the newest run's

    def run(self, path: Path, behind: int = 0) -> list[bytes]:
        """From where the folder says that it was, with a broker that has committed all before that, but for so many
        rounds that were in flight, or so many more; what the model's blocks are in the end."""
        return asyncio.run(self._run(path, behind))

    async def _run(self, path: Path, behind: int) -> list[bytes]:
        setup = self.setup
        for block, values in zip(setup.manifest.blocks, self.base, strict=True):
            write_block(setup.model, block, values)
        folder = StateFolder(path)
        state = folder.begin(Identity("c", "run", setup.manifest.digest))
        loop = asyncio.get_running_loop()
        link = self.link = Link(setup, self.broker, state)
        releases = Releases(folder, "run", state, setup.config) if setup.config.privacy.local else None
        keeper = Keeper(folder, state, loop.call_soon_threadsafe, link.fail)
        position = state.position.round if state is not None and state.position is not None else 0
        landed = [-1] if state is None else [-1, *(block.round for block in state.blocks.values())]
        link.start(max(position - behind, max(landed) + 1), state)
        trainer = Trainer(setup, 2, link.arrivals, lambda _round, _step: None, keeper)
        if state is not None:
            trainer.resume(state, folder)
        try:
            await RoundLoop(setup, link, call, trainer, LoopLag(), keeper, state, releases).run()  # type: ignore[arg-type]
        finally:
            keeper.close()
            link.outbox.close()
        assert link.failure is None, link.failure
        return [read_block(setup.model, block).numpy().tobytes() for block in setup.manifest.blocks]


def copies(monkeypatch: pytest.MonkeyPatch, folder: Path, into: Path) -> list[Path]:
    """The folder as it was before and after each file that is written from now on, without repetitions."""
    write, taken, seen = tensor_file.write, [], set()

    def copy() -> None:
        files = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*.safetensors"))
        if (now := tuple(files)) not in seen:
            seen.add(now)
            taken.append(into / f"{len(taken):03d}")
            shutil.copytree(folder, taken[-1])

    def noted(*arguments: Any, **named: Any) -> int:
        copy()
        written = write(*arguments, **named)
        copy()
        return written

    monkeypatch.setattr(tensor_file, "write", noted)
    return taken


@pytest.mark.parametrize("mode", MODES)
def test_whenever_it_is_killed_it_goes_on_as_if_it_had_not_been(
    mode: str, loaded: tuple[Setup, list[torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(loaded, MODES[mode])
    with monkeypatch.context() as patched:
        states = copies(patched, tmp_path / "state", tmp_path)
        undisturbed = world.run(tmp_path / "state")
    assert undisturbed == [values.tobytes() for values in world.broker.values]
    assert len(states) > 2 * ROUNDS
    for number, path in enumerate(states):
        behind = number % (world.setup.config.in_flight + 1)
        assert world.run(path, behind) == undisturbed, f"{path.name}, {behind} rounds behind"


def test_one_that_has_fallen_behind_takes_over_what_was_made_without_it(
    loaded: tuple[Setup, list[torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guesses that have landed meanwhile, those that nothing is heard of any more, and the rounds it has missed."""
    world = World(loaded, {})
    with monkeypatch.context() as patched:
        states = copies(patched, tmp_path / "state", tmp_path)
        undisturbed = world.run(tmp_path / "state")
    world.broker.exact = False
    for path in states[8:16]:
        for more in (1, 3):
            again = tmp_path / "again"
            shutil.copytree(path, again)
            assert world.run(again, -more) == undisturbed, f"{path.name}, {more} rounds behind"
            assert not list((again / "contributions").iterdir())
            shutil.rmtree(again)


def test_with_fewer_blocks_than_rounds_in_flight_a_guess_upon_a_guess_does_not_stand_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was finished counts all the same, and in the end it holds what all hold."""
    tables = {"blocks": {"num_blocks": 2}, "pipeline": {"max_in_flight": 2}}
    world = World(load(**tables), tables)
    with monkeypatch.context() as patched:
        states = copies(patched, tmp_path / "state", tmp_path)
        undisturbed = world.run(tmp_path / "state")
    world.broker.exact = False
    for path in states[10:20]:
        assert world.run(path, 1) == undisturbed
    assert "what stood for its block until it lands is not restored" in caplog.text


def left(link: Link | None) -> dict[int, bytes]:
    """By round, what has left of its contribution so far."""
    coming = dict(link.coming) if link is not None else {}
    return {round: b"".join(bytes(chunk.payload) for chunk in list(chunks)) for round, chunks in coming.items()}


@pytest.mark.parametrize("up", ["float32", "int8"])
def test_no_round_leaves_a_second_time_with_other_noise_whenever_it_is_killed(
    up: str, loaded: tuple[Setup, list[torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either what had left before leaves again, bit for bit, or nothing does; its residual is of noisy values too."""
    privacy = {"where": "local", "clip": 1e-3, "noise": 1.0, "budget": 100.0}
    world = World(loaded, {"privacy": privacy, "codec": {"up": up}})
    states, had_left = [], []
    write, lock = tensor_file.write, threading.Lock()

    def noted(*arguments: Any, **named: Any) -> int:
        written = write(*arguments, **named)
        with lock:  # what has left is noted by another thread than the keeper's
            had_left.append(left(world.link))  # first: what leaves meanwhile is in the folder by then
            states.append(tmp_path / f"{len(states):03d}")
            while True:  # the keeper drops files meanwhile
                try:
                    shutil.copytree(tmp_path / "state", states[-1])
                except shutil.Error:
                    shutil.rmtree(states[-1])
                else:
                    return written

    with monkeypatch.context() as patched:
        patched.setattr(tensor_file, "write", noted)
        undisturbed = world.run(tmp_path / "state")
    assert left(world.link).keys() == set(range(ROUNDS))
    world.broker.exact = False
    withheld = 0
    for path, before in list(zip(states, had_left, strict=True))[:: 2 if up == "float32" else 5]:
        assert world.run(path, len(before) % 2) == undisturbed
        assert world.link is not None
        after = left(world.link)
        for round in before.keys() & after.keys():
            assert after[round].startswith(before[round]), f"{path.name}: round {round} left with other noise"
        withheld += len(world.link.withheld)
        assert set(world.link.withheld) <= set(range(ROUNDS)) - after.keys()
    assert withheld, "in some states that it leaves was noted, and it was not kept"
