"""Light clients: the real link and participant without a model, so that the exchange is all that a round costs.

    python -m bench.light --broker ENDPOINT --first 0 --count 128 --blocks 2 --block-bytes 65536 --report FILE

Any number of them live in one process, on one event loop. In each round a client rests for a fixed time, contributes
an update (the same one, or one that follows from its name and the round), and waits for the block. What it measured,
and a digest of all blocks that it holds, go to a file; what is made of them is the benchmark's business. Imports no
torch.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import secrets
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq
import zmq.asyncio

from bench import synthetic, usage
from bench.gate import AsyncVisitor
from bench.listener import ListeningLink
from broker.__main__ import loop_factory
from parablock import config as settings
from parablock import keys, messages
from parablock.allocator import keep_freed_memory
from parablock.participant_events import Contribute, Prepared, Say, SitOut, Wait
from workers.comeback import kept
from workers.executor import SWITCH_INTERVAL_S
from workers.keeper import Keeper
from workers.link import Link, SessionEnded
from workers.socket import Credentials
from workers.state_folder import Contribution, Identity, LandedBlock, StateFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from bench.synthetic import Update
    from parablock.manifest import Manifest
    from parablock.participant_events import Arrived, Kept

    Vector = npt.NDArray[np.float32]

_PATIENCE_S = 300.0


class Host:
    """What `parablock.staging` is on the host, without torch: a buffer is where it shall be as soon as it is filled."""

    def __init__(self) -> None:
        self._free: list[Vector] = []

    def buffer(self, numel: int) -> Vector:
        return self._free.pop() if self._free and self._free[-1].size == numel else np.empty(numel, np.float32)

    def bring(self, values: Vector) -> Brought:
        return Brought(values, time.monotonic())

    def release(self, values: Vector) -> None:
        self._free.append(values)


@dataclass(frozen=True)
class Brought:
    """A block, and when the last of it was there."""

    values: Vector
    at: float


@dataclass(frozen=True)
class Made:
    """A delta that need not be waited for."""

    values: Vector

    @property
    def numel(self) -> int:
        return self.values.size

    def wait(self) -> Vector:
        return self.values


class LightClient:
    """One client of a run. update: what it contributes to (round, numel).

    watch: looked at after each round; then the times are forgotten as soon as they are reported. state: the folder in
    which it keeps what outlives its process, as a worker does; None: nothing.
    """

    def __init__(
        self,
        link: Link,
        name: str,
        manifest: Manifest,
        update: Callable[[int, int], Update],
        pause_s: float,
        gate: AsyncVisitor | None,
        watch: usage.Watch | None,
        state: Path | None = None,
    ) -> None:
        self._link = link
        self._name = name
        self._manifest = manifest
        self._update = update
        self._pause_s = pause_s
        self._gate = gate
        self._watch = watch
        self._state = state
        self._keeper: Keeper | None = None
        self._host = Host()
        self._held: dict[int, tuple[int, Vector]] = {}  # by block: the round that made it, and its values
        self._began: dict[int, float] = {}
        self._arrived: dict[int, float] = {}

    async def run(self) -> dict[str, Any]:
        """Take part from the first round to the last, and say how it went. Raises SessionEnded where it ends early."""
        link = self._link
        await link.until(lambda: link.terms is not None)
        assert link.terms is not None
        config = settings.from_json(link.terms)
        left = None if self._state is None else self._come_back(self._state, config)
        link.prepared(Prepared(config, self._manifest, synthetic.WEIGHTS, synthetic.TOKENIZER, 1, left), self._host)
        round = 0
        while True:
            # The last block too is to land: beyond the last round nothing may be on its way any more.
            upcoming = round if round < config.rounds else config.rounds + config.in_flight
            if not self._ready(upcoming):
                link.handle(Wait(upcoming - config.in_flight - 1))
            await link.until(partial(self._ready, upcoming))
            await self._take()
            if link.started is not None:  # the first start, or a new one for a client that fell behind
                started, link.started = link.started, None
                round = max(round, started.round)
                if self._keeper is not None:
                    self._keeper.closed(started.next, started.pending)
                continue
            if round >= config.rounds:
                break
            if self._gate is not None:
                await self._gate.wait()
            turn = link.participant.turn(round)
            assert turn is not None
            if turn.trains:
                if self._pause_s:
                    await asyncio.sleep(self._pause_s)
                self._contribute(round, turn.block)
            else:
                link.handle(SitOut(round))
            if self._watch is not None:
                self._watch.look(round)
            round = max(round + 1, link.participant.told)
            if self._keeper is not None:
                self._keeper.moved_on(round, 0, link.clients, astray=False)
        await link.leave("done")
        if self._keeper is not None:
            self._keeper.remove()
        return {
            "name": self._name,
            "digest": self._digest(),
            "began": [[round, at] for round, at in self._began.items()],
            "held": [[round, at] for round, at in self._arrived.items()],
        }

    def _come_back(self, path: Path, config: settings.Config) -> Kept | None:
        """Begin to keep what this process does; what an earlier one of this client has left."""
        run, link = self._link.participant.run, self._link
        folder = StateFolder(path)
        state = folder.begin(Identity(self._name, run, self._manifest.digest))
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        self._keeper = Keeper(folder, state, call_soon, lambda error: link.fail({"exception": error}))
        if state is None:
            return None
        self._held = {block: (landed.round, folder.block(block)) for block, landed in state.blocks.items()}
        return kept(state, config, self._manifest, run)

    def close(self) -> None:
        """Before the link."""
        if self._keeper is not None:
            self._keeper.close()

    def _ready(self, round: int) -> bool:
        return self._link.started is not None or self._link.participant.may_train(round)

    def _contribute(self, round: int, block: int) -> None:
        self._began[round] = time.monotonic()
        made = self._update(round, self._manifest.blocks[block].numel)
        delta = Made(made.values)
        offered, _ = self._link.contribute(Contribute(round, block, made.weight, made.steps, made.loss), delta)
        if self._keeper is not None:
            given = Contribution(round, block, made.weight, made.steps, made.loss, offered, (1.0,), None)
            self._keeper.contributed(given, delta, None)

    async def _take(self) -> None:
        """Keep what has arrived in place of what it replaces, and report on it as a worker does."""
        while self._link.arrivals:
            delivery = self._link.arrivals.popleft()
            arrived = delivery.arrived
            assert not delivery.change, "light clients hold blocks in full"
            if delivery.values is None:
                self._arrived[arrived.round] = arrived.ended
                if self._keeper is not None:
                    self._keeper.dropped(arrived.round)
            else:
                brought: Brought = await asyncio.wrap_future(delivery.values)
                self._arrived[arrived.round] = brought.at
                newest, before = self._held.get(arrived.block, (-1, None))
                if arrived.round > newest:
                    self._held[arrived.block] = arrived.round, brought.values
                    if self._keeper is not None:
                        landed = LandedBlock(arrived.block, arrived.round, None, alone=False, position=0, miss=0.0)
                        self._keeper.landed(landed, brought.values)  # which may be written later: they stay as they are
                    elif before is not None:
                        self._host.release(before)
            self._link.handle(Say(self._report(arrived)))
            if self._watch is not None:
                self._began.pop(arrived.round, None)
                self._arrived.pop(arrived.round, None)

    def _report(self, arrived: Arrived) -> messages.Landed:
        began = self._began.get(arrived.round)
        return messages.Landed(
            round=arrived.round,
            computing=(began - self._pause_s, began) if began is not None else (0.0, 0.0),
            uploading=self._link.uploads.pop(arrived.round, (0.0, 0.0)),
            downloading=(arrived.began, arrived.ended),
            waiting=(0.0, 0.0),
            alpha=1.0,
            drift=0.0,
            miss=0.0,
            steps=1,
            staleness=0,
            loop_lag_ms=0.0,
        )

    def _digest(self) -> str:
        """SHA-256 over the blocks that were ever exchanged, with their rounds, as hexadecimal text."""
        digest = hashlib.sha256()
        for block, (round, values) in sorted(self._held.items()):
            digest.update(f"{block} {round}\n".encode())
            digest.update(values.data)
        return digest.hexdigest()


async def take_part(options: argparse.Namespace) -> dict[str, Any]:
    """All clients of this process, to the end of the run. Raises what any of them raises."""
    manifest = synthetic.manifest(options.blocks, options.block_bytes)
    memory = usage.Memory()
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, 4 * options.count + 8)  # its default is 1023
    plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
    links, gates, clients = [], [], []
    watch = usage.Watch(options.watch) if options.watch else None
    for index in range(options.first, options.first + options.count):
        name = synthetic.client_name(index)
        make = partial(ListeningLink, options.log) if options.log else Link
        credentials = _credentials(options.keys, name) if options.keys is not None else None
        link = make(options.broker, name, secrets.token_hex(16), _PATIENCE_S, lambda: None, plain, credentials)
        links.append(link)
        gate = AsyncVisitor(context, options.gate) if options.gate else None
        if gate is not None:
            gates.append(gate)
        update = partial(synthetic.update, name)
        if not options.varied:
            update = partial(_same, synthetic.Update(synthetic.delta(index, options.block_bytes // 4), 1, 1, 0.0))
        clients.append(LightClient(link, name, manifest, update, options.pause_s, gate, watch, options.state))

    def fail(_loop: asyncio.AbstractEventLoop, trouble: dict[str, Any]) -> None:
        for link in links:
            link.fail(trouble)

    asyncio.get_running_loop().set_exception_handler(fail)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.run()) for client in clients]
    finally:
        for client in clients:
            client.close()
        for link in links:
            link.close()
        for gate in gates:
            gate.close()
        if watch is not None:
            watch.close()
        context.term()
    return {"clients": [task.result() for task in tasks], "peak_bytes": memory.peak()}


def _credentials(folder: Path, name: str) -> Credentials:
    broker = keys.read_public(folder / f"{keys.BROKER}{keys.PUBLIC}")
    return Credentials(keys.read_secret(folder / f"{name}{keys.SECRET}"), broker.key)


def _same(update: Update, _round: int, numel: int) -> Update:
    """The same in every round, so that making it costs nothing."""
    return replace(update, values=update.values[:numel])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 where a session ended before the run did."""
    parser = argparse.ArgumentParser(prog="python -m bench.light", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--broker", required=True, metavar="ENDPOINT", help="where the broker listens")
    add("--keys", type=Path, metavar="DIR", help="the clients' keys and the broker's public one; without: unencrypted")
    add("--first", type=int, default=0, help="number of the first client of this process")
    add("--count", type=int, default=1, help="how many clients live here")
    add("--blocks", type=int, required=True, help="blocks of the synthetic model")
    add("--block-bytes", type=int, required=True, help="bytes of each of them, in float32")
    add("--varied", action="store_true", help="an update of its own for each round (bench.synthetic), by client's name")
    add("--log", type=Path, metavar="FILE", help="write there what the client, of which there is one, hears and does")
    add(
        "--state",
        type=Path,
        metavar="DIR",
        help="keep there what the client, of which there is one, goes on from",
    )
    add("--pause-s", type=float, default=0.0, help="rest before each contribution, in place of training")
    add("--gate", default="", metavar="ENDPOINT", help="wait here before each round")
    add("--report", type=Path, required=True, metavar="FILE", help="where to write what was measured, as JSON")
    add(
        "--watch", type=Path, metavar="FILE", help="write there what this process holds after each round; no times then"
    )
    options = parser.parse_args(argv)
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            report = runner.run(take_part(options))
        except BaseExceptionGroup as failed:
            ended, others = failed.split(SessionEnded)
            if others is not None or ended is None:
                raise
            print(f"bench.light: {ended.exceptions[0]}", file=sys.stderr)
            return 1
    partial = options.report.with_suffix(".partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.rename(options.report)  # at once: the benchmark waits for the file
    return 0


if __name__ == "__main__":
    sys.exit(main())
