"""The trainer: which rows a round takes, and that it does not matter when a device copies."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import config
from parablock.aggregation import server_move, weighted_mean
from parablock.blocks import read_block
from parablock.participant_events import Arrived
from parablock.staging import Staging
from tests import families
from tests.test_staging import Copies
from workers import trainer
from workers.inbox import Delivery
from workers.setup import Local, Setup, prepare
from workers.trainer import Trainer

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.batch import Batch
    from parablock.config import Config
    from parablock.staging import Incoming

    Vector = npt.NDArray[np.float32]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first step, steps) of every round that is trained, as the rows for them were asked for."""
    seen: list[tuple[int, int]] = []

    def noted(_rows: object, _seed: int, _client: str, first: int, steps: int, _settings: object) -> list[list[Batch]]:
        seen.append((first, steps))
        return families.batches(steps, seed=first)

    monkeypatch.setattr(trainer, "step_batches", noted)
    return seen


def prepared(run: Config) -> Setup:
    local = Local("c", "builtin", "", (0, 64), "", "cpu", 1, False)  # few of the rows, so that they are soon tokenized
    return prepare(json.dumps(config.to_dict(run, shared_only=True)), local)


def client(run: Config) -> Trainer:
    return Trainer(prepared(run), 1, deque(), lambda _round, _step: None)


def test_with_fixed_steps_a_rounds_rows_depend_on_its_number_alone(taken: list[tuple[int, int]]) -> None:
    trainer = client(config.from_dict({"solver": {"steps": 3}}))
    for round in (0, 1, 7):  # the broker may start a client anywhere
        trainer.train(round, [round % 4], 3)
    assert taken == [(0, 3), (3, 3), (21, 3)]


def test_with_adaptive_steps_a_round_goes_on_where_the_last_one_ended(taken: list[tuple[int, int]]) -> None:
    trainer = client(config.from_dict({"solver": {"steps": 3, "adaptive": True}}))
    for round, steps in ((2, 3), (3, 5), (4, 1), (5, 2), (7, 4)):
        trainer.train(round, [round % 4], steps)
    # The round that was not trained here counts as three steps.
    assert taken == [(6, 3), (9, 5), (14, 1), (15, 2), (20, 4)]


def test_a_client_that_sits_a_round_out_passes_no_rows_by(taken: list[tuple[int, int]]) -> None:
    trainer = client(config.from_dict({"solver": {"steps": 3}, "round": {"fraction": 0.5, "clients": 4}}))
    trainer.train(0, [0], 3)
    trainer.sit_out()
    trainer.sit_out()
    trainer.train(3, [3], 3)
    assert taken == [(0, 3), (3, 3)]


def brought(staging: Staging, values: Vector) -> Future[Incoming]:
    future: Future[Incoming] = Future()
    buffer = staging.buffer(values.size)
    buffer[:] = values
    future.set_result(staging.bring(buffer))
    return future


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("correction", ["own", "shrink"])
def test_a_device_that_copies_on_its_own_changes_nothing(correction: str, late: bool) -> None:
    """Rounds, landings one round late and a given-up guess, with the copies made at once or at the last moment."""
    run = config.from_dict({"solver": {"steps": 1, "batch_size": 2}, "pipeline": {"correction": correction}})
    told = []
    for staging in (Staging(None), Staging(Copies(late=late))):
        setup = dataclasses.replace(prepared(run), staging=staging)
        arrivals: deque[Delivery] = deque()
        trainer = Trainer(setup, 2, arrivals, lambda _round, _step: None)
        committed: list[Delivery] = []
        for round in range(5):
            (solved,) = trainer.train(round, [round % len(setup.manifest.blocks)], 1)
            arrivals.extend(committed)
            committed = []
            trainer.land(round - 1, round + 1)
            assert solved.values is not None
            if round != 2:  # of that one nothing will be heard
                held = read_block(setup.model, setup.manifest.blocks[solved.block]).numpy()
                value = held + np.float32(0.5) * solved.values.wait()
                arrived = Arrived(round, solved.block, 0, -1, 2, True, 0.0, 1.0)
                committed = [Delivery(arrived, brought(staging, value), change=False)]
        trainer.revert(3, ())
        told.append([read_block(setup.model, block).numpy().tobytes() for block in setup.manifest.blocks])
    assert told[0] == told[1]


@pytest.mark.parametrize("change", [False, True], ids=["value", "change"])
def test_blocks_are_the_brokers_bit_for_bit_whether_they_come_whole_or_as_changes(change: bool) -> None:
    """Over two visits of every block, with guesses in between; also of a block that a guess stands for."""
    run = config.from_dict({"solver": {"steps": 1, "batch_size": 2}, "blocks": {"num_blocks": 2}})
    setup = prepared(run)
    arrivals: deque[Delivery] = deque()
    trainer = Trainer(setup, 2, arrivals, lambda _round, _step: None)
    x = [read_block(setup.model, block).numpy().copy() for block in setup.manifest.blocks]
    made = dict.fromkeys(range(2), -1)
    for round in range(4):
        (solved,) = trainer.train(round, [round % len(setup.manifest.blocks)], 1)
        block = solved.block
        assert solved.values is not None
        said = np.float32(1 / 3) * solved.values.wait()
        x[block] = x[block] + said
        arrived = Arrived(round, block, 1, made[block], 2, True, 0.0, 1.0)
        made[block] = round
        arrivals.append(Delivery(arrived, brought(setup.staging, said if change else x[block]), change=change))
        trainer.land(round - 1, round + 1)
    trainer.land(3, 4)
    for block in setup.manifest.blocks:
        assert read_block(setup.model, block).numpy().tobytes() == x[block.index].tobytes()


@pytest.mark.parametrize(
    ("solver", "server"),
    [
        ({"optimizer": "sgd", "momentum": 0.9, "state": "keep", "lr": 0.1}, {"optimizer": "adam", "lr": 1e-3}),
        ({"optimizer": "adafactor", "lr": 1e-2}, {"optimizer": "yogi", "lr": 1e-3}),
    ],
    ids=["sgd kept, adam", "adafactor, yogi"],
)
def test_whatever_the_optimizers_clients_hold_the_brokers_blocks(solver: Any, server: Any) -> None:
    """Two clients, each one round behind; every block is trained twice."""
    run = config.from_dict(
        {"solver": {"steps": 1, "batch_size": 2, **solver}, "server": server, "blocks": {"num_blocks": 2}}
    )
    setups = [dataclasses.replace(prepared(run), name=name) for name in "ab"]
    inboxes: list[deque[Delivery]] = [deque(), deque()]
    clients = [
        Trainer(setup, 2, inbox, lambda _round, _step: None) for setup, inbox in zip(setups, inboxes, strict=True)
    ]
    x = [read_block(setups[0].model, block).numpy().copy() for block in setups[0].manifest.blocks]
    base, state = [values.copy() for values in x], dict[int, dict[str, Any]]()
    for round in range(4):
        solved = [each.train(round, [round % 2], 1)[0] for each in clients]
        block = solved[0].block
        deltas = [part.values.wait() for part in solved if part.values is not None]
        mean = weighted_mean(deltas, [part.weight for part in solved])
        move, state[block] = server_move(run.server, mean, state.get(block, {}))
        x[block] = x[block] + move
        arrived = Arrived(round, block, 1, -1, 2, True, 0.0, 1.0)
        for setup, inbox, each in zip(setups, inboxes, clients, strict=True):
            inbox.append(Delivery(arrived, brought(setup.staging, x[block]), change=False))
            each.land(round - 1, round + 1)
    for setup, each in zip(setups, clients, strict=True):
        each.land(3, 4)
        for block in setup.manifest.blocks:
            assert read_block(setup.model, block).numpy().tobytes() == x[block.index].tobytes()
    assert not any((x[n] == base[n]).all() for n in range(2))


@pytest.mark.parametrize("change", [False, True], ids=["value", "change"])
def test_what_is_trained_at_once_lands_block_by_block(change: bool, taken: list[tuple[int, int]]) -> None:
    """In lisa: two rounds of one training each, both blocks in place before the next one begins."""
    run = config.from_dict({"mode": "lisa", "solver": {"steps": 3, "batch_size": 2}, "blocks": {"num_blocks": 2}})
    setup = prepared(run)
    arrivals: deque[Delivery] = deque()
    trainer = Trainer(setup, 2, arrivals, lambda _round, _step: None)
    x = [read_block(setup.model, block).numpy().copy() for block in setup.manifest.blocks]
    made: dict[int, int] = {}
    for round in range(0, 8, 2):
        blocks = [0, 1 + round // 2 % 2]
        first, second = trainer.train(round, blocks, 3)
        assert [(solved.round, solved.block) for solved in (first, second)] == [*enumerate(blocks, start=round)]
        assert (first.weight, first.steps, first.loss) == (second.weight, second.steps, second.loss)
        for solved in (first, second):
            assert solved.values is not None
            said = np.float32(1 / 3) * solved.values.wait()
            x[solved.block] = x[solved.block] + said
            arrived = Arrived(solved.round, solved.block, 1, made.get(solved.block, -1), 2, True, 0.0, 1.0)
            made[solved.block] = solved.round
            values = brought(setup.staging, said if change else x[solved.block])
            arrivals.append(Delivery(arrived, values, change=change))
        landed = trainer.land(round + 1, round + 2)
        assert [(land.arrived.round, land.staleness) for land in landed] == [(round, 0), (round + 1, 0)]
        for block in setup.manifest.blocks:
            assert read_block(setup.model, block).numpy().tobytes() == x[block.index].tobytes()
    assert taken == [(0, 3), (3, 3), (6, 3), (9, 3)], "each training takes the next rows"


def test_a_training_that_diverges_is_of_no_use_to_any_of_its_rounds() -> None:
    run = config.from_dict({"mode": "lisa", "solver": {"steps": 1, "batch_size": 2, "lr": 1e39, "clip": 0}})
    trainer = client(run)
    told = trainer.train(2, [0, 3], 1)
    assert [(solved.round, solved.values) for solved in told] == [(2, None), (3, None)]
    assert all("(embeddings + final norm + head + layer " in solved.reason for solved in told)


def test_a_round_that_the_broker_has_spent_on_another_block_takes_our_guess_back() -> None:
    """As its restart does where a block's file was damaged."""
    trainer = client(config.from_dict({"solver": {"steps": 1}, "round": {"clients": 2}}))
    setup = trainer._setup
    before = [read_block(setup.model, block) for block in setup.manifest.blocks]
    trainer.train(0, [0], 1)
    repaired = before[2].numpy() + 1.0
    arrived = Arrived(0, 2, 0, -1, 1, False, 0.0, 0.0)
    trainer._arrivals.append(Delivery(arrived, brought(setup.staging, repaired), change=False))
    (landed,) = trainer.land(0, 1)
    assert (landed.alpha, landed.drift, landed.miss) == (0.0, 0.0, 0.0)
    for index, block in enumerate(setup.manifest.blocks):
        held = read_block(setup.model, block).numpy()
        assert held.tobytes() == (repaired if index == 2 else before[index].numpy()).tobytes()


def test_a_change_of_another_version_is_our_own_bug() -> None:
    setup = prepared(config.from_dict({"solver": {"steps": 1, "batch_size": 2}}))
    arrivals: deque[Delivery] = deque()
    trainer = Trainer(setup, 2, arrivals, lambda _round, _step: None)
    values = np.zeros(setup.manifest.blocks[0].numel, np.float32)
    arrived = Arrived(5, 0, 1, 2, 2, False, 0.0, 1.0)
    arrivals.append(Delivery(arrived, brought(setup.staging, values), change=True))
    with pytest.raises(AssertionError, match="a change of round 2's block 0, which is round -1's"):
        trainer.land(5, 6)
