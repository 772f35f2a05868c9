"""The staleness benchmark: its settings, rows by hand, one small run, and what it and the simulation refuse."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

from bench import simulation, simulations, staleness
from bench.simulation import Outcome, Simulation
from bench.simulations import Task
from bench.staleness import Cell
from parablock import config
from parablock.blocks import read_block

if TYPE_CHECKING:
    from pathlib import Path


CELL = Cell("scratch", 4, 8, 1.0)
BUILTIN = [
    "data.train=builtin",
    "data.eval=builtin",
    "rounds=4",
    "solver.steps=1",
    "solver.batch_size=1",
    "eval.rows=2",
    "blocks.num_blocks=2",
]


def cells(*arguments: str) -> list[tuple[str, int, int, float]]:
    options = staleness._parser().parse_args(["--data", ".", *arguments])
    return [(cell.problem, cell.clients, cell.steps, cell.rate) for cell in staleness._plan(options, None).cells]


def test_one_thing_at_a_time_is_changed_from_the_middle() -> None:
    assert cells("--problems", "scratch", "--rates", "1,4") == [
        ("scratch", 4, 8, 1.0),
        ("scratch", 2, 8, 1.0),
        ("scratch", 8, 8, 1.0),
        ("scratch", 4, 4, 1.0),
        ("scratch", 4, 16, 1.0),
        ("scratch", 4, 8, 4.0),
    ]


def test_where_the_middle_is_not_asked_for_the_first_value_stands_for_it() -> None:
    asked = ("--problems", "tasks,scratch", "--clients", "2", "--steps", "16,4")
    assert cells(*asked) == [(name, 2, steps, 1.0) for name in ("tasks", "scratch") for steps in (16, 4)]


def test_a_row_by_hand() -> None:
    found = {
        (CELL, "fedbcd", 0): Outcome(2.0, 0.5, 0),
        (CELL, "fedbcd", 1): Outcome(4.0, 0.5, 0),
        (CELL, "own", 0): Outcome(2.02, 1.5, 3),
        (CELL, "own", 1): Outcome(4.04, 2.5, 4),
    }
    row = staleness.row(CELL, "own", [0, 1], found)
    assert row["gap"]["gap_pct"] == pytest.approx(1.0)
    assert row["gap"]["verdict"] == "beyond"
    assert (row["miss"], row["synchronous"]) == (2.0, 7)
    assert row["final_loss"] == pytest.approx(math.sqrt(2.02 * 4.04))
    assert staleness.row(CELL, "fedbcd", [0, 1], found)["gap"] is None


def test_a_small_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "staleness.json"
    smaller = ("rounds=3", "eval.rows=2", "solver.batch_size=1")
    arguments = ["--quick", *(f"--set={setting}" for setting in smaller), "--jobs", "2", "--out", str(out)]
    assert staleness.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text(encoding="utf-8"))
    assert [row["case"] for row in told["rows"]] == ["fedbcd", "parablock"]
    assert told["worst_gap_pct"]["parablock"] == told["rows"][1]["gap"]["gap_pct"]
    assert out.with_suffix(".png").stat().st_size > 0


def test_what_one_of_many_runs_raises_is_raised() -> None:
    console = Console(file=io.StringIO(), width=100)
    roots = {name: Task(name, math.sqrt, (value,)) for name, value in (("four", 4.0), ("nine", 9.0))}
    assert simulations.run(roots, 1, console, "root {}".format) == {"four": 2.0, "nine": 3.0}
    assert "2 of 2: nine: root 3.0; 0 min left" in console.file.getvalue()
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        simulations.run({"none": Task("none", math.sqrt, (-1.0,))}, 1, console)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--problems", "scratch"], "--data names the folder"),
        (["--problems", "nothing"], "--problems takes scratch, .*; got nothing"),
        (["--quick", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--problems", "builtin", "--cases", "lora"], "--cases takes fedbcd, .*; got lora"),
        (["--problems", "builtin", "--steps", "1.5"], "--steps takes numbers above 0, .*; got '1.5'"),
        (["--problems", "builtin", "--rates", "0"], "--rates takes numbers above 0, .*; got '0'"),
        (["--problems", "builtin", "--cases", "slow-one", "--steps", "4,3"], "slow-one halves K, .*; got .*K = 3"),
        (["--problems", "builtin", "--set", "codec.up=int8"], "codecs are not simulated"),
        (["--problems", "builtin", "--set", "pipeline.land=arrival"], "depends on the link"),
        (["--problems", "builtin", "--set", "solver.step=3"], "solver.step"),
        (["--problems", "builtin", "--variant", "parablock", "rounds=3"], "--variant takes a new name .*'parablock'"),
        (["--quick", "--variant", "x", "rounds=3"], "--quick has two cases, and takes no --variant"),
        (["--problems", "builtin", "--variant", "short"], "--variant takes a new name and what it sets, .*'short'"),
        (["--problems", "builtin", "--variant", "x", "seed=3"], "the same for all cases; leave seed=3 out"),
        (["--problems", "builtin", "--variant", "x", "solver.step=3"], "solver.step"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert staleness.main(arguments) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(("case", "like"), [("slow-one", "parablock"), ("slow-one-fedbcd", "fedbcd")])
def test_a_slow_one_takes_half_of_the_steps(case: str, like: str) -> None:
    options = staleness._parser().parse_args(["--data", ".", "--cases", f"parablock,{case}", "--steps", "8"])
    plan = staleness._plan(options, None)
    assert plan.cases == ("fedbcd", "parablock", case)
    assert plan.steps(CELL, case) == (4, 8, 8, 8)
    assert plan.steps(CELL, like) is None
    assert plan.settings(CELL, case, 0, "builtin") == plan.settings(CELL, like, 0, "builtin")


def test_longer_is_a_tenth_more_rounds() -> None:
    plan = staleness._plan(staleness._parser().parse_args(["--data", ".", "--cases", "longer", "--rounds", "32"]), None)
    rounds = {case: plan.settings(CELL, case, 0, "builtin").rounds for case in plan.cases}
    assert rounds == {"fedbcd": 32, "longer": 35}
    assert plan.settings(CELL, "longer", 0, "builtin").mode == "parablock"
    assert plan.steps(CELL, "longer") is None


@pytest.mark.parametrize("case", ["fedbcd", "parablock"])
def test_a_disturbed_case_differs_in_where_it_begins_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Task[Outcome]] = []

    def ran(tasks: dict[tuple[Cell, str, int], Task[Outcome]], *_: object) -> dict[tuple[Cell, str, int], Outcome]:
        asked.extend(tasks.values())
        return dict.fromkeys(tasks, Outcome(1.0, 0.5, 0))

    monkeypatch.setattr(simulations, "run", ran)
    monkeypatch.chdir(tmp_path)
    arguments = ["--problems", "builtin", "--clients", "2", "--steps", "1", "--seeds", "3"]
    assert staleness.main([*arguments, "--cases", f"{case},{case}~"]) == 0
    named = {task.name: task.arguments for task in asked}
    as_it_is, disturbed = (named[f"builtin, 2 clients, K = 1, {each}, seed 3"] for each in (case, f"{case}~"))
    assert as_it_is[:3] == disturbed[:3]
    assert (as_it_is[3], disturbed[3]) == (0.0, staleness.DISTURBANCE)


def test_a_variant_is_parablock_with_settings_of_its_own() -> None:
    asked = ["--variant", "sgd", "solver.optimizer=sgd", "solver.lr=0.3", "--variant", "fewer", "rounds=16"]
    plan = staleness._plan(staleness._parser().parse_args(["--data", ".", *asked]), None)
    assert plan.cases == ("fedbcd", "parablock", "sgd", "fewer")
    ours, sgd, fewer = (plan.settings(CELL, case, 0, "builtin") for case in plan.cases[1:])
    assert (sgd.solver.optimizer, sgd.solver.lr, fewer.rounds) == ("sgd", 0.3, 16)
    assert replace(sgd, solver=ours.solver) == ours == replace(fewer, rounds=ours.rounds)
    assert staleness.result([], plan)["variants"] == {"sgd": asked[2:4], "fewer": ["rounds=16"]}


# The simulation


def simulated(**settings: Any) -> tuple[Simulation, Outcome]:
    given = config.load(None, [*BUILTIN, *(f"{key}={value}" for key, value in settings.items())])
    made = Simulation(given)
    return made, made.run()


def test_the_guard_makes_rounds_synchronous() -> None:
    stale = {"pipeline.correction": "stale"}
    assert simulated(**stale)[1].synchronous == 0, "the default is above 1"
    made, outcome = simulated(**stale, **{"pipeline.max_miss": 0.5})
    assert outcome.synchronous == 4, "two clients in rounds 2 and 3; nothing had landed before round 1"
    assert outcome.miss == 1.0
    assert [client.synchronous for client in made.clients] == [2, 2]


def test_a_disturbance_is_the_same_for_all_clients_and_small() -> None:
    given = config.load(None, BUILTIN)
    plain, made = Simulation(given), Simulation(given, disturbance=1e-3)
    for number, block in enumerate(made.clients[0].setup.manifest.blocks):
        values = made.blocks[number]
        off = np.linalg.norm(values - plain.blocks[number]) / np.linalg.norm(plain.blocks[number])
        assert 0.9e-3 < off < 1.1e-3
        assert all(np.array_equal(read_block(client.setup.model, block), values) for client in made.clients)


def test_steps_may_differ_between_clients() -> None:
    given = config.load(None, [*BUILTIN, "solver.steps=2", "rounds=2"])
    made = Simulation(given, steps=(1, 2))
    trained = [client.train(0, [0])[0] for client in made.clients]
    assert [each.steps for each in trained] == [1, 2]
    assert trained[0].weight < trained[1].weight


def test_a_simulation_refuses_what_depends_on_the_link() -> None:
    with pytest.raises(ValueError, match=r"solver\.adaptive depends on the link"):
        simulation.check(config.load(None, [*BUILTIN, "solver.adaptive=true"]))
    with pytest.raises(ValueError, match=r"data\.eval names no held-out rows"):
        simulation.check(config.load(None, ["data.train=builtin"]))
