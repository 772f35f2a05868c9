"""The convergence benchmark: its rows on runs that are made up, its cases, one real run, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from bench import convergence, convergence_cases
from bench.convergence_cases import CASES, Case, Conditions
from bench.learning_curve import LearningCurve, Point
from bench.paired import percent
from bench.shaping import BURST_S
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GIVEN = Conditions(
    config=None, overrides=(), rates={"own": 2e-3}, rounds={"own": 70}, clients=2, link="loopback", link_rate=None
)


def curve(*losses: float, round_s: float = 1.0, nbytes: int = 100) -> LearningCurve:
    """Evaluated after every fourth round, from 5.0 before training."""
    points = [Point(4 * n, loss, 4 * n * round_s, 4 * n * nbytes) for n, loss in enumerate((5.0, *losses))]
    return LearningCurve(tuple(points), compute_s=round_s, comm_s=None)


def found_row(case: str, curves: Sequence[LearningCurve], reference: Sequence[LearningCurve]) -> dict[str, Any]:
    return convergence.row(CASES[case], curves, reference, GIVEN)


# Rows ---------------------------------------------------------------------------------------------------------


def test_the_speed_up_at_equal_loss_by_hand() -> None:
    reference = curve(3.0, 2.0, 1.0)  # 12 s
    assert convergence.speedup(reference, reference) == 1.0
    assert convergence.speedup(curve(3.0, 2.0, 1.0, round_s=0.5), reference) == 2.0
    assert convergence.speedup(curve(2.0, 0.5, 0.4), reference) == pytest.approx(12 / (4 + 4 * 2 / 3))
    assert convergence.speedup(curve(3.0, 2.0, 1.01, round_s=0.1), reference) is None  # never got there
    assert convergence.speedup(reference, curve(3.0, 2.0, 6.0)) is None  # what is worse than before is reached at once
    # Its own last loss was there earlier: that is when it got there.
    assert convergence.speedup(curve(3.0, 2.0, 1.0), curve(1.0, 0.5, 1.0)) == pytest.approx(4 / 12)


def test_a_share_of_time_is_what_all_seeds_have_in_the_mean() -> None:
    assert convergence.share([2.0]) == {"mean": pytest.approx(0.5), "low": None, "high": None}
    two = convergence.share([2.0, 8.0])
    assert two is not None
    assert two["mean"] == pytest.approx(0.25)
    assert two["low"] * two["high"] == pytest.approx(0.25**2)
    assert two["low"] < 0.25 < two["high"]
    assert convergence.share([2.0, None]) is None


def test_the_median_takes_never_for_the_slowest() -> None:
    assert convergence.median([1.5]) == 1.5
    assert convergence.median([None, 1.5, 2.0]) == 1.5
    assert convergence.median([None, None, 2.0]) is None
    assert convergence.median([1.5, 2.0]) == 1.5
    assert convergence.median([None, 2.0]) is None


def test_a_row_from_runs_by_hand() -> None:
    reference = [curve(2.0, 1.0), curve(2.0, 1.1)]
    row = found_row("own", [curve(2.2, 1.01, round_s=0.5), curve(1.8, 1.089, round_s=0.7)], reference)
    logs = [math.log(1.01), math.log(0.99)]
    assert row["gap"]["gap_pct"] == pytest.approx(percent(statistics.fmean(logs)))
    assert row["gap"]["low_pct"] < 0 < row["gap"]["high_pct"]
    assert "verdict" not in row["gap"]
    assert row["final_loss"] == pytest.approx(math.sqrt(1.01 * 1.089))
    assert (row["compute_s"], row["comm_s"]) == (pytest.approx(0.6), None)
    assert (row["lr"], row["bytes"], row["time_s"]) == (2e-3, 400, pytest.approx(4.8))
    assert row["speedups"][0] is None
    assert row["speedups"][1] == pytest.approx(8 / (0.7 * (4 + 4 * 0.7 / 0.711)))
    assert (row["reached"], row["speedup_at_equal_loss"]) == (1, None)
    assert row["equal_loss_s"] == [None, pytest.approx(0.7 * (4 + 4 * 0.7 / 0.711))]
    assert (row["share_of_time"], row["rounds"]) == (None, 8)
    assert row["rounds_by_evaluation"] == [0, 4, 8]
    assert row["time_s_by_evaluation"] == pytest.approx([0, 2.4, 4.8])
    assert row["bytes_by_evaluation"] == [0, 200, 400]
    assert (row["lowest_by_evaluation"][1], row["highest_by_evaluation"][1]) == (1.8, 2.2)
    same = found_row("fedbcd", reference, reference)
    assert (same["equal_loss_s"], same["share_of_time"]["mean"]) == ([8.0, 8.0], 1.0)
    assert (same["gap"], same["speedup_at_equal_loss"], same["reached"]) == (None, 1.0, 2)
    assert same["lr"] == 5e-3  # the quickstart's


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_table_and_the_plot_show_every_row(seeds: int, tmp_path: Path) -> None:
    curves = {
        "fedbcd": [curve(2.0, 1.0 + 0.01 * n) for n in range(seeds)],
        "parablock": [curve(2.0, 0.99 + 0.011 * n, round_s=0.5) for n in range(seeds)],
        "lora": [curve(4.0, 3.0, nbytes=10)] * seeds,
    }
    rows = [found_row(case, each, curves["fedbcd"]) for case, each in curves.items()]
    told = " ".join(shown(convergence.table(rows, GIVEN)).split())
    assert f"{seeds} of {seeds}" in told
    assert f"– (0 of {seeds})" in told
    assert "loopback" in told
    assert "-1.00" in told if seeds == 1 else "(-" in told
    convergence.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plan = convergence.Plan(tuple(CASES.values()), tuple(range(seeds)), GIVEN, None)
    result = json.loads(json.dumps(convergence.result(rows, plan), allow_nan=False))
    assert (
        result["final_loss"].keys() == result["speedup_at_equal_loss"].keys() == result["bytes"].keys() == set(curves)
    )
    assert result["gap_pct"].keys() == {"parablock", "lora"}
    assert (result["gap_pct"]["lora"]["low"] is None) == (seeds == 1)
    assert result["speedup_at_equal_loss"]["lora"] is None


# Runs ---------------------------------------------------------------------------------------------------------


def test_a_case_is_settings_that_the_config_takes() -> None:
    for case in CASES.values():
        settings = GIVEN.settings(case, 7)
        assert settings.mode == ("parablock" if case.name in ("own", "stale") else case.name)
        assert (settings.seed, settings.round.clients) == (7, 2)
        assert settings.solver.lr == (2e-3 if case.name == "own" else 5e-3)
        assert settings.rounds == (70 if case.name == "own" else 64)
    corrections = [GIVEN.settings(CASES[name], 0).pipeline.correction for name in ("parablock", "own", "stale")]
    assert corrections == ["shrink", "own", "stale"]


def test_cases_take_turns_at_who_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int]] = []

    def train(case: Case, seed: int, given: Conditions, folder: Path) -> LearningCurve:
        assert given.overrides == ("rounds=12",)
        assert (given.clients, given.link, given.link_rate) == (3, "user", 1e6)
        assert (given.rates, given.rounds) == ({"own": 1e-3}, {"own": 14})
        assert not folder.exists()
        ran.append((case.name, seed))
        return curve(2.0, 1.0 + 0.01 * len(ran))

    monkeypatch.setattr(convergence_cases, "train", train)
    out = tmp_path / "convergence.json"
    arguments = ["--seeds", "3-4", "--cases", "own,fedbcd", "--set", "rounds=12", "--clients", "3", "--lr", "own=1e-3"]
    arguments += ["--rounds", "own=14"]
    assert convergence.main([*arguments, "--rate", "8mbit", "--link", "user", "--out", str(out)]) == 0
    assert ran == [("fedbcd", 3), ("own", 3), ("own", 4), ("fedbcd", 4)]
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert (result["seeds"], result["config"], result["rate_bytes_s"]) == ([3, 4], "quickstart", 1e6)
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "seed 4 (2 of 2), fedbcd" in " ".join(told.err.split())


def test_of_several_runs_at_a_time_each_seed_stays_with_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_many(asked: Sequence[tuple[Case, int]], _given: Conditions, jobs: int, _folder: Path) -> Any:
        assert jobs == 3
        for case, seed in reversed(asked):  # the last to begin is the first to end
            yield case, seed, curve(2.0, 1.0 + 0.01 * seed + 0.001 * (case.name == "own"))

    monkeypatch.setattr(convergence_cases, "train_many", train_many)
    out = tmp_path / "result.json"
    assert convergence.main(["--seeds", "3,4", "--cases", "own", "--jobs", "3", "--out", str(out)]) == 0
    told = capsys.readouterr()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["jobs"], result["times_compare"]) == (3, False)
    losses = {row["case"]: row["final_losses"] for row in result["rows"]}
    assert losses == {"fedbcd": [1.03, 1.04], "own": [1.031, 1.041]}
    assert "TIMES AND SPEED-UPS DO NOT COMPARE" in " ".join(told.err.split())


def test_quick_is_one_seed_of_two_cases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, int, int]] = []

    def train(case: Case, seed: int, given: Conditions, _folder: Path) -> LearningCurve:
        ran.append((case.name, seed, given.settings(case, seed).rounds))
        return curve(2.0, 1.0)

    monkeypatch.setattr(convergence_cases, "train", train)
    assert convergence.main(["--quick"]) == 0
    assert ran == [("fedbcd", 0, 8), ("parablock", 0, 8)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seeds"] == [0]


def test_one_small_run_over_a_link(tmp_path: Path) -> None:
    small = ("rounds=2", "eval.every=1", "solver.steps=1", "solver.batch_size=2", "eval.rows=8", "eval.generate=0")
    given = Conditions(config=None, overrides=small, rates={}, rounds={}, clients=2, link="user", link_rate=2e6)
    found = convergence_cases.train(CASES["own"], 0, given, tmp_path / "run")
    assert [point.rounds for point in found.points] == [0, 1, 2]
    assert found.nbytes > 0
    # A round's block goes up before its commit, the second one after the first, and each may begin with a burst.
    assert found.points[2].time_s - found.points[0].time_s >= found.nbytes / 2 / 2 / 2e6 - 2 * BURST_S


# Wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cases", "own,badam"], "separated by commas; got badam"),
        (["--seeds", "one"], "--seeds takes numbers and ranges"),
        (["--clients", "0"], "--clients must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--jobs", "2", "--rate", "8mbit"], "leave one out"),
        (["--set", "rounds=0"], "rounds must be"),
        (["--set", "mode=fedavg"], "--set mode is not possible"),
        (["--set", "data.eval="], "data.eval names no held-out rows"),
        (["--config", "nowhere.toml"], "cannot read the config file nowhere.toml"),
        (["--lr", "own"], "--lr takes CASE=VALUE with a number"),
        (["--lr", "own=0"], "solver.lr must be"),
        (["--lr", "lora=1"], "--lr takes CASE=VALUE, once for a case of fedbcd, own"),
        (["--lr", "own=1", "--lr", "own=2"], "--lr takes CASE=VALUE, once"),
        (["--rounds", "own=1.5"], "--rounds takes CASE=VALUE with a whole number"),
        (["--rounds", "own=0"], "rounds must be"),
        (["--rounds", "lora=9"], "--rounds takes CASE=VALUE, once for a case of fedbcd, own"),
        (["--rate", "fast"], "is not a rate"),
        (["--link", "user"], "there are none without --rate"),
        (["--quick", "--seeds", "0-4"], "--quick is one seed of fedbcd and parablock"),
        (["--quick", "--cases", "own"], "--quick is one seed of fedbcd and parablock"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [] if {"--cases", "--quick"} & set(arguments) else ["--cases", "own"]
    assert convergence.main([*cases, *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert convergence.main([]) == 2
    told = capsys.readouterr().err
    assert "peft, for lora and ffa-lora, is not installed" in told
    assert "--cases fedbcd,parablock,own,stale,fedcybgd,fedavg" in told
