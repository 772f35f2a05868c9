"""The memory benchmark: its arithmetic on peaks that are made up, its models, its output, and one small measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import memory, metered, solver_alone, workload
from bench.grid import Grid
from bench.memory import Peaks
from bench.workload import Workload
from parablock import config
from parablock.blocks import read_block
from parablock.solver import BlockSolver, Trained
from tests.shown import shown
from workers.setup import Local, prepare

MADE = Workload(Path("model"), Path("rows"), blocks=4, block_bytes=4_000_000, model_bytes=17_000_000)
PLAN = memory.Plan(Grid((4.0,), (2,), rounds=8, repeat=1), out=None, where=None)


def found_row(clients: int = 2, worker: int = 414_000_000) -> dict[str, Any]:
    return memory.row(clients, MADE, Peaks(400_000_000, worker, broker=330_000_000, idle_broker=300_000_000))


def test_a_row_from_peaks_by_hand() -> None:
    row = found_row()
    assert (row["workers"], row["block_mb"], row["model_mb"]) == (2, 4.0, 17.0)
    assert (row["solver_peak_mb"], row["worker_peak_mb"], row["worker_bound_mb"]) == (400.0, 414.0, 412.0)
    assert row["extra_blocks"] == 3.5
    # The model, a block for each of two clients, and three more.
    assert (row["broker_peak_mb"], row["broker_bound_mb"]) == (30.0, 37.0)


def test_the_result_has_the_worst_row_in_front_and_survives_json() -> None:
    rows = [{**row, "extra_blocks_by_repeat": [1.0]} for row in (found_row(1, 404_000_000), found_row())]
    found = json.loads(json.dumps(memory.result(rows, PLAN), allow_nan=False))
    assert (found["bench"], found["workers"], found["extra_blocks"], found["bar_blocks"]) == ("memory", 2, 3.5, 3)
    assert len(found["rows"]) == 2
    assert "extra_blocks_by_repeat" not in found
    assert found["machine"]["cores"] >= 1


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    rows = [found_row(1), found_row(2)]
    assert shown(memory.table(rows)).count("3.50") == 2
    memory.plot(rows).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("block_mb", [0.2, 4.0])
def test_a_model_has_blocks_of_about_the_size_that_was_asked_for(block_mb: float, tmp_path: Path) -> None:
    made = workload.make(tmp_path, hidden=memory.hidden(block_mb), layers=2, vocabulary=memory.VOCABULARY)
    assert made.blocks == 2
    assert made.block_bytes == pytest.approx(block_mb * 1e6, rel=0.1)
    on_disk = (made.model / "model.safetensors").stat().st_size
    assert made.model_bytes == pytest.approx(on_disk, abs=16_384)  # the names and shapes in the file
    assert memory.hidden(1e-3) == 8


# What is measured ---------------------------------------------------------------------------------------------


def test_a_command_runs_as_it_would_and_its_peak_is_told(tmp_path: Path) -> None:
    peaks = []
    for nbytes in (1, 50_000_000):
        report = tmp_path / f"{nbytes}.json"
        command = [sys.executable, "-c", f"print(len(b'x' * {nbytes}))"]
        done = subprocess.run([*metered.prefix(report), *command], capture_output=True, text=True, check=True)
        assert done.stdout == f"{nbytes}\n"
        peaks.append(metered.read(report))
    assert peaks[1] - peaks[0] == pytest.approx(50_000_000, abs=5_000_000)


def test_a_command_that_fails_is_told_by_its_exit_code_and_has_no_report(tmp_path: Path) -> None:
    for code, ending in ((3, "sys.exit(3)"), (137, "os.kill(os.getpid(), 9)")):
        command = [*metered.prefix(tmp_path / "report.json"), sys.executable, "-c", f"import os, sys; {ending}"]
        assert subprocess.run(command, check=False).returncode == code
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("solver", [{}, {"optimizer": "sgd", "momentum": 0.9, "state": "keep"}], ids=str)
def test_the_solver_alone_applies_its_own_updates_round_by_round(tmp_path: Path, solver: dict[str, Any]) -> None:
    made = workload.make(tmp_path, hidden=16, layers=2, vocabulary=memory.VOCABULARY)
    settings = workload.settings(made, "parablock", rounds=2, clients=2, steps=1, bind="tcp://127.0.0.1:5557")
    settings = replace(settings, solver=replace(settings.solver, **solver))
    local = Local("worker-0", str(made.data), "", (0, 2), "", "cpu", 1, False)
    setup = prepare(json.dumps(config.to_dict(settings)), local)
    before = [read_block(setup.model, block) for block in setup.manifest.blocks]
    trained: list[tuple[int, torch.Tensor]] = []

    class Watched(BlockSolver):
        def write_guess(self, block: int, update: Trained, alpha: Any) -> None:
            trained.append((block, update.start + update.delta))
            assert set(alpha) == {1.0}
            super().write_guess(block, update, alpha)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_alone, "BlockSolver", Watched)
        solver_alone.descend(setup)
    assert [block for block, _ in trained] == [1, 0]
    for block, values in trained:
        assert torch.equal(read_block(setup.model, setup.manifest.blocks[block]), values)
        assert not torch.equal(values, before[block])


def test_one_small_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    small = ["--block-mb", "0.2", "--clients", "1", "--rounds", "2", "--repeat", "1", "--out", str(out)]
    assert memory.main(small) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert printed["solver_peak_mb"] > 100  # torch alone is more
    assert printed["worker_peak_mb"] > 100
    assert printed["broker_idle_mb"] > 100
    assert len(printed["rows"][0]["extra_blocks_by_repeat"]) == 1
    assert out.with_suffix(".png").stat().st_size > 1000


def test_another_system_than_linux_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.main([]) == 2
    assert "this is darwin" in capsys.readouterr().err
