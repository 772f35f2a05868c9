"""bench.solver: what its figures mean, that all ways train the same blocks, and one small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench import fine_tuning, solver, workload
from bench.fine_tuning import METHODS
from parablock.blocks import read_block
from tests.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.setup import Setup

PLAN = solver.Plan(
    methods=("blocks", "bare"), dtype="float32", turns=2, layers=2, hidden=16, steps=2, out=None
)  # fmt: skip


def found() -> list[dict[str, Any]]:
    def report(seconds: float, peak: int) -> dict[str, Any]:
        return {"sweep_s": seconds, "peak_bytes": peak}

    # The machine is twice as slow in the second turn; the ratios do not see it.
    ours = [report(1.0, 100_000_000), report(2.0, 100_000_000)]
    return solver.rows(
        {
            "blocks": ours,
            "bare": [report(1.0, 80_000_000), report(2.0, 80_000_000)],
            "adamw": [report(2.0, 400_000_000), report(4.0, 400_000_000)],
        },
        steps=10,
    )


def test_ratios_are_taken_within_a_turn() -> None:
    ours, bare, adamw = found()
    assert ours["step_ms"] == pytest.approx(150.0)
    assert (ours["step_ratio"], ours["peak_ratio"]) == (1.0, 1.0)
    assert (bare["step_ratio"], bare["peak_ratio"]) == (1.0, 1.25)
    assert (adamw["step_ratio"], adamw["peak_ratio"]) == (0.5, 0.25)
    assert adamw["step_ms_by_turn"] == pytest.approx([200.0, 400.0])


def test_the_result_has_the_keys_of_the_contract_and_survives_json() -> None:
    made = workload.Workload(Path("model"), Path("rows"), blocks=2, block_bytes=1000, model_bytes=3000)
    told = json.loads(json.dumps(solver.result(found(), PLAN, made), allow_nan=False))
    assert told["bench"] == "solver"
    assert told["step_ms"].keys() == told["peak_mb"].keys() == {"blocks", "bare", "adamw"}


def test_the_table_says_what_is_within_its_bar_and_the_plot_shows_every_row(tmp_path: Path) -> None:
    rows = found()
    told = shown(solver.table(rows))
    assert "1.000 (within 1.02)" in told
    assert "0.250 (within 0.5)" in told
    rows[1]["step_ratio"] = 1.03
    assert "1.030 (above 1.02)" in shown(solver.table(rows))
    solver.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    made = workload.make(tmp_path, hidden=16, layers=2, vocabulary=solver.VOCABULARY)
    return fine_tuning.setup_of(solver.settings(made, PLAN))


def test_the_bare_loop_makes_the_same_steps(setup: Setup) -> None:
    """What it is compared with is the same work: a block's values after a sweep are the solver's, to rounding."""
    trained = []
    for name in ("blocks", "bare"):
        again = setup if name == "blocks" else fine_tuning.setup_of(setup.config)
        before = [read_block(again.model, block).clone() for block in again.manifest.blocks]
        fine_tuning.sweep(again, METHODS[name](again), 0)
        after = [read_block(again.model, block) for block in again.manifest.blocks]
        assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        trained.append(after)
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adamw_moves_every_parameter(setup: Setup) -> None:
    before = {name: parameter.detach().clone() for name, parameter in setup.model.named_parameters()}
    fine_tuning.sweep(setup, METHODS["adamw"](setup), 0)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in setup.model.named_parameters())


@pytest.mark.parametrize("name", fine_tuning.NEEDS)
def test_a_rival_trains_what_it_should(name: str, setup: Setup) -> None:
    pytest.importorskip(fine_tuning.NEEDS[name], reason="an extra: pip install -e '.[rivals]'")
    before = {name: parameter.detach().clone() for name, parameter in setup.model.named_parameters()}
    fine_tuning.sweep(setup, METHODS[name](setup), 0)
    after = {key.replace(".base_layer", ""): value for key, value in setup.model.named_parameters()}
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    if name == "lora":  # an adapter leaves the model's own parameters alone
        assert not moved
        second = [value for key, value in after.items() if ".lora_B." in key]
        assert second
        assert all(bool(value.any()) for value in second)  # they began at zero
    else:
        assert {key.split(".")[2] for key in moved if ".layers." in key} == {"0", "1"}
        assert all(".layers." in key for key in moved)


def test_one_small_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert solver.main(["--quick", "--methods", "bare", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert [row["method"] for row in printed["rows"]] == ["blocks", "bare"]
    assert all(row["step_ms"] > 0 for row in printed["rows"])
    assert all(row["peak_mb"] > printed["model_bytes"] / 1e6 for row in printed["rows"])
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--methods", "sgd"], "--methods takes blocks, bare"), (["--turns", "0"], "--turns must be at least 1")],
)
def test_wrong_input_is_told_before_anything_runs(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solver.main([*arguments] if "--methods" in arguments else ["--methods", "bare", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_package_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fine_tuning, "NEEDS", {"lora": "no_such_package"})
    assert solver.main(["--methods", "lora"]) == 2
    assert "no_such_package is not installed: pip install" in capsys.readouterr().err
