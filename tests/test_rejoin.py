"""A worker that leaves and comes back, in modes whose blocks are no partition of the model's own layers: broker and
workers as they are, over loopback, on one event loop of one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from broker.__main__ import load_base
from broker.opening import begin
from broker.server import Broker
from broker.socket import RouterSocket
from parablock import builtin
from parablock.blocks import read_block
from parablock.config import from_dict
from parablock.run_folder import RunFolder
from tests.test_trainable import adapters
from workers import setup
from workers.__main__ import Worker
from workers.contact import Contact
from workers.setup import Local, Setup
from workers.trainer import Solved, Stopped, Trainer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.timeout(60)

ROUNDS, LEAVES, PAUSE = 12, 4, 6


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A worker sets its process's switch interval and number of threads."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for is in files
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def working(local: Local, endpoint: str) -> AsyncIterator[tuple[Worker, asyncio.Task[int]]]:
    """A worker without its process: nothing of it takes signals."""
    worker = Worker(local, Contact(endpoint), 30.0)
    task = asyncio.get_running_loop().create_task(worker._take_part())
    try:
        yield worker, task
    finally:
        worker._torch.close()
        worker._link.close()


def setup_of(worker: Worker) -> Setup:
    assert worker._trainer is not None
    return worker._trainer._setup


@pytest.mark.parametrize("mode", [pytest.param("lora", marks=adapters), "lisa"])
def test_who_comes_back_gets_what_changed_and_ends_with_what_all_hold(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {
        "mode": mode,
        "rounds": ROUNDS,
        "round": {"clients": 2, "quorum": 1},
        "solver": {"steps": 1, "batch_size": 2, "lr": 1e-2},
        "network": {"heartbeat_s": 0.2, "timeout_s": 5.0, "resend_s": 2.0},
    }
    config = from_dict(tree)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    locals_ = [Local(name, str(data), "", (index, 2), "", "cpu", 1, False) for index, name in enumerate("ab")]

    # Before round LEAVES the one is interrupted, before round PAUSE the other waits until it is back.
    back = threading.Event()
    train = Trainer.train

    def interrupted(trainer: Trainer, round: int, blocks: Sequence[int], steps: int) -> list[Solved]:
        if trainer._setup.name == "b" and round == LEAVES:
            raise Stopped
        assert round < PAUSE or trainer._setup.name == "b" or back.wait(30)
        return train(trainer, round, blocks, steps)

    # One after the other: the built-in model is drawn from torch's generator, which threads of a process share.
    prepare, turn = setup.prepare, threading.Lock()

    def in_turn(terms: str, local: Local) -> Setup:
        with turn:
            return prepare(terms, local)

    monkeypatch.setattr(Trainer, "train", interrupted)
    monkeypatch.setattr(setup, "prepare", in_turn)

    async def scenario() -> tuple[list[Setup], tuple[int, ...]]:
        opened = begin(config, tmp_path / "run", load_base(config))
        folder, socket = opened.folder, RouterSocket("tcp://127.0.0.1:*")
        broker = Broker(opened, socket)
        serving = asyncio.get_running_loop().create_task(broker.run())

        def rounds() -> int:
            return sum(row["kind"] == "round" for row in folder.read_metrics())

        async with working(locals_[0], socket.endpoint) as (staying, stayed):
            async with working(locals_[1], socket.endpoint) as (_, left):
                assert await left == 75
            await until(lambda: rounds() >= PAUSE)  # alone
            async with working(locals_[1], socket.endpoint) as (returned, ended):
                participant = returned._link.participant
                await until(lambda: participant._start is not None)
                pending = participant._start.pending
                back.set()
                assert [await stayed, await ended, (await serving).complete] == [0, 0, True]
                opened.close()
                return [setup_of(staying), setup_of(returned)], pending

    setups, pending = asyncio.run(scenario())
    folder = RunFolder.open(tmp_path / "run")
    rows = [row for row in folder.read_metrics() if row["kind"] == "round"]
    missing = range(LEAVES, PAUSE + config.in_flight + 1)  # a newcomer begins where nobody has to wait for it
    assert [row["contributors"] for row in rows] == [
        ["a"] if round in missing else ["a", "b"] for round in range(ROUNDS)
    ]
    newest = {row["block"]: row["round"] for row in rows if row["round"] < PAUSE}
    assert set(pending) == set(newest.values()), "the newest version of each block that has changed, once"
    stored = folder.load_blocks()
    assert {index: version for index, (version, _) in stored.items()} == {
        **dict.fromkeys(range(len(stored)), 0),
        **{row["block"]: row["round"] + 1 for row in rows},
    }
    base = dict(builtin.model(0).named_parameters())
    for each in setups:
        for block in each.manifest.blocks:
            held = read_block(each.model, block).numpy()
            assert block.index not in stored or held.tobytes() == stored[block.index][1].tobytes()
        if mode == "lora":
            frozen: dict[str, Any] = dict(each.model.named_parameters())
            assert sum(name.endswith("base_layer.weight") for name in each.manifest.frozen) == 28
            for name in each.manifest.frozen:
                assert torch.equal(frozen[name], base[name.replace(".base_layer", "")]), "the model itself stays"
    assert setups[0].manifest == setups[1].manifest
