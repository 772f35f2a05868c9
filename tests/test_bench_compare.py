from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bench import compare
from parablock.config import from_dict
from parablock.run_folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path


def finished(path: Path, mode: str, losses: tuple[float, ...]) -> None:
    with RunFolder.create(path, from_dict({"mode": mode})) as folder:
        for place, loss in enumerate(losses):
            folder.append_metrics({"kind": "evaluation", "round": place - 1, "eval_loss": loss})
        for round in range(4):
            seconds = {"round_s": 1.0 + round, "compute_s": 0.5, "comm_s": 0.4, "exposed_s": 0.1 * round}
            counts = {"loss": 2.0 - 0.1 * round, "time_s": 1.0 + round, "bytes_up": 10, "bytes_down": 20}
            folder.append_metrics({"kind": "round", "round": round, **seconds, **counts})


def test_the_gap_is_to_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "base", "fedbcd", (2.0, 1.0))
    finished(tmp_path / "other", "parablock", (2.0, 1.01))
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "other"), "--out", str(tmp_path / "r.json")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    base, other = told["runs"]
    assert (base["gap_pct"], base["mode"]) == (None, "fedbcd")
    assert other["gap_pct"] == pytest.approx(1.0)
    assert other["round_s"] == pytest.approx(2.5)
    assert other["exposed_s"] == pytest.approx(0.15)
    assert other["bytes"] == 120
    assert json.loads((tmp_path / "r.json").read_text()) == told
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_an_unfinished_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "base", "fedbcd", (2.0,))
    assert compare.main([str(tmp_path / "base")]) == 2
    assert "fewer than two evaluations" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "nowhere")]) == 2
