"""The robustness benchmark: its attacks, rows by hand, one small run, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench import robust, simulation, simulations, spread
from bench.attacks import ATTACKS, Attack
from bench.robust import Ended
from bench.simulation import Outcome
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bench.simulation import Forge
    from bench.simulations import Task
    from parablock.config import Config

DELTAS = {n: np.random.default_rng(n).standard_normal(50, np.float32) for n in range(5)}
HONEST = np.mean([DELTAS[n] for n in (2, 3, 4)], axis=0)


def sent(kind: str, round: int = 0, seed: int = 0) -> dict[int, np.ndarray]:
    return Attack(kind, 2, seed)(round, DELTAS)


@pytest.mark.parametrize("kind", ATTACKS)
def test_honest_clients_send_what_they_have_made(kind: str) -> None:
    forged = sent(kind)
    assert all(forged[client] is DELTAS[client] for client in (2, 3, 4))
    assert all(forged[client].tobytes() != DELTAS[client].tobytes() for client in (0, 1))
    assert {each.dtype for each in forged.values()} == {np.dtype(np.float32)}


def test_attacks_by_hand() -> None:
    np.testing.assert_allclose(sent("flipped")[1], -5.0 * DELTAS[1])
    np.testing.assert_allclose(sent("equal")[0], -5.0 * HONEST, rtol=1e-4, atol=1e-6)
    assert sent("equal")[0].tobytes() == sent("equal")[1].tobytes()
    assert np.isnan(sent("nan")[0]).sum() == 1
    assert np.linalg.norm(sent("random")[0]) == pytest.approx(10.0 * np.linalg.norm(DELTAS[0]), rel=1e-5)
    hidden = sent("hidden")[0]
    assert np.linalg.norm(hidden) == pytest.approx(np.median([np.linalg.norm(DELTAS[n]) for n in (2, 3, 4)]), rel=1e-5)
    assert float(hidden @ HONEST) / np.linalg.norm(hidden) / np.linalg.norm(HONEST) == pytest.approx(-1.0, abs=1e-5)


def test_noise_is_that_of_the_seed_the_round_and_the_client() -> None:
    assert sent("random")[0].tobytes() == sent("random")[0].tobytes()
    others = {sent("random")[0].tobytes(), sent("random")[1].tobytes(), sent("random", 1)[0].tobytes()}
    assert len(others | {sent("random", seed=1)[0].tobytes()}) == 4


PLAN = robust.Plan(
    rules=("mean", "median"), attacks=("none", "flipped"), clients=4, bad=1, steps=1, rounds=2, scratch=True,
    same_rows=False, seeds=(0,), overrides=(), jobs=1, out=None,
)  # fmt: skip


def test_a_row_by_hand() -> None:
    found = {
        ("mean", "none", 0): Ended(2.0, (0.5, 1.0)),
        ("median", "none", 0): Ended(2.5, (1.0, 2.0)),
        ("median", "flipped", 0): Ended(3.0, (4.0, math.inf)),
        ("mean", "flipped", 0): Ended(math.nan, (math.inf, math.inf)),
    }
    row = robust.row("median", "flipped", PLAN, found)
    assert (row["gap"]["gap_pct"], row["gap_to_own"]["gap_pct"]) == (pytest.approx(50.0), pytest.approx(20.0))
    assert (row["spread"], row["asked"], row["asked_held"]) == (None, None, 0.0), "the median lies between 4 and no end"
    clean = robust.row("median", "none", PLAN, found)
    assert (clean["spread"], clean["asked"], clean["asked_held"]) == (1.5, pytest.approx(1.5 * 0.75), 0.5)
    blown = robust.row("mean", "flipped", PLAN, found)
    assert (blown["final_losses"], blown["gap"], blown["asked_held"]) == ([None], None, None)
    rows = [robust.row("mean", "none", PLAN, found), blown, clean, row]
    told = json.loads(json.dumps(robust.result(rows, PLAN), allow_nan=False))
    assert told["worst_gap_pct"] == {"mean": None, "median": pytest.approx(50.0)}
    assert told["worst_gap_to_own_pct"] == {"mean": None, "median": pytest.approx(20.0)}
    assert told["asked"] == {"mean": None, "median": pytest.approx(1.125)}
    assert "1.12 (50%)" in shown(robust.table(rows, PLAN))
    assert robust.plot(rows)


def test_over_seeds_a_gap_is_held_against_the_bar() -> None:
    plan = dataclasses.replace(PLAN, seeds=(0, 1))
    found = {
        (rule, attack, seed): Ended(2.0, (1.0,)) for rule, attack, seed in product(plan.rules, plan.attacks, (0, 1))
    }
    found |= {("median", "none", 0): Ended(2.02, (1.0,)), ("median", "flipped", 1): Ended(2.2, (1.0,))}
    verdicts = {attack: robust.row("median", attack, plan, found)["gap"]["verdict"] for attack in plan.attacks}
    assert verdicts == {"none": "undecided", "flipped": "undecided"}
    found |= {("median", "none", 1): Ended(2.022, (1.0,)), ("median", "flipped", 0): Ended(2.201, (1.0,))}
    verdicts = {attack: robust.row("median", attack, plan, found)["gap"]["verdict"] for attack in plan.attacks}
    assert verdicts == {"none": "within", "flipped": "beyond"}


def test_only_the_spread_of_the_honest_ones_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sent_by_round = []

    def simulated(_settings: Config, _steps: None, forge: Forge) -> Outcome:
        sent_by_round.extend(forge(round, dict(DELTAS)) for round in (0, 1))
        return Outcome(1.5, 0.0, 0)

    monkeypatch.setattr(simulation, "outcome", simulated)
    settings = PLAN.settings("mean", 0)
    attacked = robust.outcome(settings, Attack("flipped", 2, 0))
    assert attacked == Ended(1.5, (spread.ratio([DELTAS[n] for n in (2, 3, 4)]),) * 2)
    np.testing.assert_allclose(sent_by_round[0][0], -5.0 * DELTAS[0])
    assert robust.outcome(settings, None).spreads == (spread.ratio(list(DELTAS.values())),) * 2
    assert sent_by_round[2] == DELTAS


def test_a_small_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "robust.json"
    smaller = ("rounds=2", "eval.rows=2", "solver.batch_size=1")
    assert robust.main(["--quick", *(f"--set={setting}" for setting in smaller), "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["rule"], row["attack"]): row for row in told["rows"]}
    assert set(rows) == {(rule, attack) for rule in ("mean", "median") for attack in ("none", "flipped")}
    assert rows["mean", "none"]["gap"]["gap_pct"] == 0.0
    assert 0.0 <= rows["median", "flipped"]["asked_held"] <= 1.0
    assert rows["mean", "flipped"]["final_losses"] != rows["mean", "none"]["final_losses"], "it is attacked"
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rules", "best"], "--rules takes mean, .*; got best"),
        (["--attacks", "all"], "--attacks takes flipped, .*; got all"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--bad", "0"], "--bad must be at least 1 and below --clients = 5, got 0"),
        (["--bad", "2"], r"robust.bad = 2 needs at least 7 contributions"),
        (["--set", "codec.up=int8"], "codecs are not simulated"),
        (["--same-rows", "--set", "data.train=mine.jsonl"], "--same-rows makes rows of its own; leave out"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert robust.main(arguments) == 2
    assert re.search(said, capsys.readouterr().err)


def test_unless_from_scratch_a_model_is_trained_first_and_all_runs_begin_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(tasks: Mapping[Any, Task[Any]], _jobs: int, _console: Any, _told: Any = None) -> dict[Any, Any]:
        ran.append([task.arguments[0] for task in tasks.values()])
        return dict.fromkeys(tasks, Ended(2.0, (1.0, 1.0)))

    monkeypatch.setattr(simulations, "run", run)
    arguments = ["--rules", "krum", "--attacks", "nan", "--seeds", "0"]
    assert robust.main([*arguments, "--out", str(tmp_path / "robust.json")]) == 0
    pretraining, attacked = ran
    assert [each.mode for each in pretraining] == ["fedbcd"]
    (model,) = {each.model for each in attacked}
    assert model.endswith("pretrained")
    assert {(each.seed, each.robust.rule, each.robust.bad) for each in attacked} == {(0, "mean", 0), (0, "krum", 1)}
    assert robust.main([*arguments, "--scratch"]) == 0
    (scratch,) = ran[2:]
    assert {each.model for each in scratch} == {"builtin"}
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["scratch"] for each in told] == [False, True]


def test_the_same_rows_for_all_are_as_many_as_a_round_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[list[list[bytes]]] = []

    def run(tasks: Mapping[Any, Task[Any]], _jobs: int, _console: Any, _told: Any = None) -> dict[Any, Any]:
        for task in tasks.values():
            clients = [simulation.Client(task.arguments[0], index, 1).setup.rows.rows for index in range(3)]
            dealt.append([[row.tokens.tobytes() for row in rows] for rows in clients])
        return dict.fromkeys(tasks, Ended(2.0, (1.0, 1.0)))

    monkeypatch.setattr(simulations, "run", run)
    arguments = ["--scratch", "--same-rows", "--rules", "mean", "--attacks", "nan", "--seeds", "0", "--clients", "3"]
    assert robust.main([*arguments, "--steps", "2", "--set", "solver.batch_size=3"]) == 0
    assert dealt
    for first, *others in dealt:
        assert len(set(first)) == 6
        assert others == [first, first]
