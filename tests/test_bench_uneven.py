"""The benchmark of uneven clients: its arithmetic by hand, what it refuses, and the brake."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest

from bench import braked, uneven
from bench.figures import FiguresError
from workers.trainer import Trainer


def rounds(*seconds: float, **more: Any) -> list[dict[str, Any]]:
    usual = {"kind": "round", "compute_s": 1.0, "comm_s": 2.0, "steps": 3.0, "contributors": ["a", "b"], **more}
    return [{**usual, "round": number, "round_s": took} for number, took in enumerate(seconds)]


def test_a_row_is_of_the_rounds_after_the_warm_up_without_the_tail() -> None:
    row = uneven.row("equal", [{"kind": "eval"}, *rounds(9.0, 9.0, 9.0, 1.0, 5.0, 2.0, 9.0)], warm_up=1)
    assert row["round_s"] == 2.0
    assert (row["compute_s"], row["comm_s"], row["steps"]) == (1.0, 2.0, 3.0)
    assert len(row["rounds_s"]) == 7


def test_a_round_that_missed_a_client_is_no_measurement() -> None:
    with pytest.raises(FiguresError, match="round 3 of fixed missed a client"):
        uneven.row("fixed", rounds(1.0, 1.0, 1.0, 1.0, 1.0, contributors=["a"]), warm_up=1)


def test_round_times_are_told_over_those_of_equal_clients() -> None:
    rows = [
        uneven.row(case, rounds(*[took] * 5), warm_up=1) for case, took in zip(uneven.CASES, (1, 2, 4), strict=True)
    ]
    plan = uneven.Plan(steps=4, sweeps=1, brake=2.0, kind="user", out=None)
    assert uneven.result(rows, plan, 1e6)["ratio"] == {"equal": 1.0, "uneven": 2.0, "fixed": 4.0}
    assert uneven.table(rows, plan).row_count == 3
    assert len(uneven.plot(rows).axes[0].lines) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--sweeps", "0"], "--sweeps must be at least 1, got 0"),
        (["--brake", "0.5"], r"--brake must be at least 1, got 0\.5"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert uneven.main(arguments) == 2
    assert re.search(said, capsys.readouterr().err)


def test_the_brake_makes_a_step_take_as_many_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, slept, told = [0.0], [], []
    clock = SimpleNamespace(thread_time=lambda: computed[0], sleep=slept.append)
    monkeypatch.setattr(braked, "time", clock)
    monkeypatch.setattr(Trainer, "__init__", lambda *_: None)
    trainer = braked.BrakedTrainer(3.0, *[None] * 3, lambda *step: told.append(step))  # type: ignore[arg-type]
    for step, computed[0] in enumerate((1.0, 1.5), start=1):
        trainer._after_step(7, step)
    assert slept == [2.0, 1.0]
    assert told == [(7, 1), (7, 2)]


def test_a_braked_trainer_takes_what_any_does() -> None:
    braked_takes = list(inspect.signature(braked.BrakedTrainer).parameters.values())
    assert braked_takes[0].name == "factor"
    assert braked_takes[1:] == list(inspect.signature(Trainer).parameters.values())
