"""The codecs' benchmark: its statistic, its rows on runs that are made up, its cases, and what it refuses."""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from bench import codec_cases, codecs, learning_curve
from bench.codec_cases import CASES, NULL
from bench.figures import FiguresError
from bench.learning_curve import LearningCurve, Point
from bench.paired import Paired, log_ratios, percent
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# The statistic ------------------------------------------------------------------------------------------------


def test_the_interval_of_four_pairs_by_hand() -> None:
    paired = Paired((0.01, 0.03, 0.02, 0.04))
    assert paired.mean == pytest.approx(0.025)
    assert paired.error == pytest.approx(math.sqrt(0.0005 / 3) / 2)
    low, high = paired.interval
    assert (high - low) / 2 == pytest.approx(3.182 * paired.error)  # three degrees of freedom
    assert (low + high) / 2 == pytest.approx(0.025)


def test_the_verdict_is_where_the_whole_interval_lies() -> None:
    paired = Paired((0.01, 0.03, 0.02, 0.04))
    low, high = paired.interval
    assert paired.verdict(high) == "within"
    assert paired.verdict(high - 1e-9) == "undecided"
    assert paired.verdict(low) == "undecided"
    assert paired.verdict(low - 1e-9) == "beyond"
    assert Paired((-0.5, -0.51)).verdict(0.003) == "within"  # better is good enough


def test_one_pair_decides_nothing() -> None:
    assert Paired((0.0,)).verdict(0.5) == Paired((9.0,)).verdict(0.5) == "undecided"
    told = json.loads(json.dumps(Paired((0.0,)).told(0.5), allow_nan=False))
    assert (told["gap_pct"], told["error_pct"], told["low_pct"], told["high_pct"]) == (0.0, None, None, None)
    assert told["pairs_needed"] is None


def test_as_many_pairs_as_are_said_to_be_needed_decide() -> None:
    pattern = (-0.01, 0.01)
    needed = Paired(pattern * 4).pairs_needed(0.003)
    assert needed is not None
    enough = Paired(pattern * (needed // 2 + 1))
    assert enough.interval[1] <= 0.003
    assert Paired(pattern * (needed // 4)).interval[1] > 0.003


def test_ratios_in_per_cent() -> None:
    assert log_ratios([2.0, 1.0], [1.0, 2.0]) == pytest.approx([math.log(2), -math.log(2)])
    assert percent(math.log(1.003)) == pytest.approx(0.3)


# Rows ---------------------------------------------------------------------------------------------------------


def runs(*factors: float, nbytes: int = 1000) -> list[LearningCurve]:
    """A run for each factor, by which its loss after the last of three evaluations differs."""
    return [
        LearningCurve(
            (
                Point(0, 5.0, 0.0, 0),
                Point(4, 2.0, 4.0, nbytes // 3),
                Point(8, 1.0, 8.0, 2 * nbytes // 3),
                Point(12, 0.5 * factor, 12.0, nbytes),
            )
        )
        for factor in factors
    ]


def found_row(case: str, *factors: float) -> dict[str, Any]:
    return codecs.row(CASES[case], runs(*factors, nbytes=250), runs(*[1.0] * len(factors)))


def test_a_row_from_runs_by_hand() -> None:
    row = found_row("int8", 1.001, 1.002, 1.0015)
    logs = [math.log(factor) for factor in (1.001, 1.002, 1.0015)]
    assert row["final"]["gap_pct"] == pytest.approx(percent(statistics.fmean(logs)))
    assert row["curve"]["gap_pct"] == pytest.approx(percent(statistics.fmean(logs) / 3))  # one point of three differs
    assert (row["final"]["verdict"], row["final"]["bar_pct"]) == ("within", pytest.approx(0.3))
    assert row["final_losses"] == [0.5005, 0.501, 0.50075]
    assert (row["bytes_ratio"], row["error_feedback"]) == (0.25, True)
    assert row["evaluated"] == [4, 8, 12]
    assert found_row("int4", 1.02, 1.021, 1.019)["final"]["verdict"] == "beyond"
    assert found_row("int4-", 1.5, 0.7)["final"]["verdict"] == "undecided"


def test_what_loses_nothing_has_no_speed() -> None:
    for case in ("float32", "float32~"):
        row = found_row(case, 1.0, 1.001)
        assert (row["encode_mb_s"], row["decode_mb_s"]) == (None, None)
        assert shown(codecs.table([row])).count("–") == 2
    row = found_row("int8", 1.0, 1.001)
    assert row["encode_mb_s"] > 0
    assert row["decode_mb_s"] > 0
    assert "–" not in shown(codecs.table([row]))


def test_a_null_that_changed_nothing_is_refused() -> None:
    with pytest.raises(FiguresError, match="leave float32~ out of --codecs"):
        codecs.check_null(*runs(1.0, 1.0))
    codecs.check_null(*runs(1.0, 1.0 + 1e-9))


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    for factors in ((1.0,), (1.0, 1.001)):
        rows = [found_row("float32", *factors), found_row("int8", *factors), found_row("int4-", *factors)]
        told = shown(codecs.table(rows))
        assert told.count("int") >= 2
        assert "0.3: undecided" in told
        codecs.plot(rows).savefig(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        plan = codecs.Plan(tuple(CASES.values()), (0, 1), (), None)
        assert json.loads(json.dumps(codecs.result(rows, plan), allow_nan=False))["seeds"] == [0, 1]


# Runs ---------------------------------------------------------------------------------------------------------


def test_a_case_is_settings_that_the_config_takes() -> None:
    for case in CASES.values():
        settings = learning_curve.settings(None, case.settings)
        assert (settings.codec.up, settings.codec.down) == (case.codec, case.codec)
        assert settings.codec.error_feedback == (not case.name.endswith("-"))
        assert settings.eval.every == learning_curve.EVALUATE_EVERY
    assert learning_curve.settings(None, ["solver.lr_schedule=linear", "eval.every=2"]).eval.every == 2


def test_all_seeds_and_cases_are_run_and_float32_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int]] = []

    def train(case: codec_cases.Case, seed: int, overrides: Sequence[str], folder: Path) -> LearningCurve:
        assert list(overrides) == ["rounds=12"]
        assert not folder.exists()
        ran.append((case.name, seed))
        return runs(1.0 + 0.01 * len(ran))[0]

    monkeypatch.setattr(codec_cases, "train", train)
    out = tmp_path / "codecs.json"
    arguments = ["--seeds", "3-4,7", "--codecs", "int8,float32", "--set", "rounds=12", "--out", str(out)]
    assert codecs.main(arguments) == 0
    assert ran == [(case, seed) for seed in (3, 4, 7) for case in ("float32", "int8")]
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert result["seeds"] == [3, 4, 7]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "seed 7 (3 of 3), int8" in " ".join(told.err.split())


def test_quick_is_one_seed_of_two_codecs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, int, list[str]]] = []

    def train(case: codec_cases.Case, seed: int, overrides: Sequence[str], _folder: Path) -> LearningCurve:
        ran.append((case.name, seed, list(overrides)))
        return runs(1.0)[0]

    monkeypatch.setattr(codec_cases, "train", train)
    assert codecs.main(["--quick"]) == 0
    assert ran == [("float32", 0, ["rounds=8"]), ("int4", 0, ["rounds=8"])]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seeds"] == [0]


def test_one_small_run(tmp_path: Path) -> None:
    small = ["rounds=2", "eval.every=1", "solver.steps=1", "solver.batch_size=2", "eval.rows=8", "eval.generate=0"]
    found = codec_cases.train(CASES[NULL], 0, small, tmp_path / "run")
    assert list(found.held_out) == [1, 2]
    assert found.final_loss == found.held_out[2] > 0
    assert found.nbytes > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--codecs", "int8,int5"], "separated by commas; got int5"),
        (["--seeds", "one"], "--seeds takes numbers and ranges"),
        (["--seeds", "3-1"], "--seeds takes numbers and ranges"),
        (["--seeds", "1,0-2"], "--seeds names a seed twice"),
        (["--set", "rounds=0"], "rounds must be"),
        (["--quick", "--seeds", "0-4"], "--quick is one seed of float32 and int4"),
        (["--quick", "--codecs", "int8"], "--quick is one seed of float32 and int4"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert codecs.main(arguments) == 2
    assert complaint in capsys.readouterr().err
