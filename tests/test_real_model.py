"""SmolLM2-135M-Instruct on GSM8K, from the committed config, in both modes: the main job on real input. Slow.

    PARABLOCK_SMOLLM2=DIR python -m pytest -m slow tests/test_real_model.py

DIR is made by ../shared/tools/make_smollm2.py. Takes half an hour to an hour on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parablock import export
from parablock.run_folder import RunFolder
from workers import evaluate_command

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "bench" / "configs" / "gsm8k_smollm2.toml"
DATA = ROOT.parent / "shared" / "data"
MODEL = os.environ.get("PARABLOCK_SMOLLM2", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not MODEL, reason="PARABLOCK_SMOLLM2 names no folder with SmolLM2-135M-Instruct"),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the GSM8K rows are not at {DATA}"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folders = {}
    for mode in ("parablock", "fedbcd"):
        out = tmp_path_factory.mktemp(mode) / "run"
        command = [sys.executable, "-m", "parablock.cli", "run", str(CONFIG), "--workers", "2", "--out", str(out)]
        for key, value in {
            "mode": mode,
            "model": MODEL,
            "data.train": DATA / "gsm8k_train.jsonl",
            "data.eval": DATA / "gsm8k_test.jsonl",
        }.items():
            command.append(f"--set={key}={value}")
        assert subprocess.run(command, check=False).returncode == 0
        folders[mode] = RunFolder.open(out)
    return folders


def held_out(folder: RunFolder) -> tuple[float, float]:
    losses = [row["eval_loss"] for row in folder.read_metrics() if row["kind"] == "evaluation"]
    return losses[0], losses[-1]


def test_both_modes_learn_alike(runs: dict[str, RunFolder]) -> None:
    for folder in runs.values():
        before, after = held_out(folder)
        assert before == pytest.approx(1.63, abs=0.01)
        assert after <= 1.00
    assert held_out(runs["parablock"])[1] <= 1.01 * held_out(runs["fedbcd"])[1]


def test_the_exported_folder_gives_the_same_loss(
    runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs["parablock"]
    assert export.main([str(folder.path), "--out", str(tmp_path / "model")]) == 0
    capsys.readouterr()
    data = ["--data", str(DATA / "gsm8k_test.jsonl"), "--config", str(folder.path / "config.toml"), "--json"]
    assert evaluate_command.main([str(tmp_path / "model"), *data]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(held_out(folder)[1], abs=1e-4)
