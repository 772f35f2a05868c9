"""The block timer: with a solver and a clock that are made up, what it takes for a step and what for the rest."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from parablock.config import from_dict, to_dict
from parablock.plan import Cost
from workers import timing
from workers.setup import Local, prepare
from workers.timing import BlockTimer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.setup import Setup


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Solver:
    """A round takes `before` + steps × step × (block + 1) + `after` seconds of the clock."""

    before, step, after = 0.25, 0.125, 0.5
    clock: Clock
    rounds: list[tuple[int, int]]

    def __init__(self, *_: Any) -> None:
        pass

    def train(self, block: int, batches: Sequence[Any], _lr: float, after_step: Callable[[int], None]) -> Any:
        self.rounds.append((block, len(batches)))
        self.clock.now += self.before
        for step in range(len(batches)):
            self.clock.now += self.step * (block + 1)
            after_step(step)
        return SimpleNamespace(start=torch.zeros(2), delta=torch.ones(2))

    def write(self, _block: int, values: torch.Tensor) -> None:
        assert values.tolist() == [1.0, 1.0]
        self.clock.now += self.after


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> type[Solver]:
    made = type("Made", (Solver,), {"clock": Clock(), "rounds": []})
    monkeypatch.setattr(timing, "BlockSolver", made)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=made.clock, monotonic=made.clock))
    return made


def setup_of(steps: int, **solver: Any) -> Setup:
    config = from_dict({"solver": {"steps": steps, "batch_size": 1, **solver}})
    local = Local(
        "plan", "builtin", "", (0, 64), "", "cpu", 1, False
    )  # few of the rows, so that they are soon tokenized
    return prepare(json.dumps(to_dict(config)), local)


@pytest.mark.parametrize(("steps", "timed"), [(1, 2), (2, 2), (5, 5), (1000, 8)])
def test_a_step_and_what_a_round_costs_besides(solver: type[Solver], steps: int, timed: int) -> None:
    timer = BlockTimer(setup_of(steps), steps)
    timer.warm_up(0)
    assert timer.cost(0) == Cost(0.75, 0.125)
    assert timer.cost(2) == Cost(0.75, 0.375)
    assert solver.rounds[0] == (0, 2), "the warm-up is short"
    assert {steps for _, steps in solver.rounds[1:]} == {timed}
    assert 3 <= sum(block == 2 for block, _ in solver.rounds) <= 8


def test_slow_blocks_are_timed_once_with_few_steps(solver: type[Solver]) -> None:
    solver.step = 6.0
    timer = BlockTimer(setup_of(8), 8)
    timer.warm_up(0)
    assert timer.cost(1) == Cost(0.75, 12.0)
    assert solver.rounds == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    "solver", [{}, {"state": "keep"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adafactor"}], ids=str
)
def test_a_real_block_costs_time_whatever_the_optimizer(
    solver: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_BLOCK_S", 0.0)
    torch.set_num_threads(1)
    timer = BlockTimer(setup_of(2, **solver), 2)
    timer.warm_up(3)
    assert timer.cost(0).step_s > 0
