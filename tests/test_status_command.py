"""`parablock status`: what a folder tells of a run, complete or not, served or not, and what is said of a wrong one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from parablock import accountant, status_command
from parablock.accountant import epsilon
from parablock.config import from_dict, to_dict
from parablock.journal import Journal
from parablock.journal_rows import Facts, Incarnation
from parablock.run_folder import RunFolder
from tests.test_journal import row

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PRIVATE = {"where": "local", "clip": 1.0, "noise": 4.0, "budget": 8.0}
LIFE = Incarnation(json.dumps(to_dict(from_dict({}))), "now", 1, "here", "", 0.0)


def made(path: Path, rounds: int, committed: int, reported: int = 99, **tables: object) -> RunFolder:
    """reported: of the committed rounds so many are in the metrics."""
    folder = RunFolder.create(path / "run", from_dict({"mode": "fedbcd", "rounds": rounds, **tables}))
    with Journal.create(folder.path / "journal.sqlite", Facts("run-1", "m", "base", "tokens", "")) as journal:
        journal.begin_epoch(LIFE)
        for round in range(committed):
            of = row(round)
            journal.append(replace(of, entry=replace(of.entry, charged=("a",) if "privacy" in tables else ())))
            if round < reported:
                folder.append_metrics({"kind": "round", "round": round, "loss": 2.0 - round, "epsilon": None})
    folder.append_metrics({"kind": "evaluation", "round": 0, "eval_loss": 1.25, "exact_match": 0.5})
    folder.close()
    return folder


def told(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> str:
    assert status_command.main([str(folder.path)]) == 0
    return capsys.readouterr().out


def test_a_run_that_goes_on_says_who_serves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path, rounds=9, committed=2)
    (folder.path / "endpoint").write_text("tcp://127.0.0.1:5557\n")
    with RunFolder.open(folder.path) as broker:
        broker.lock("now")
        out = told(folder, capsys)
    assert "run-1  fedbcd  builtin" in out
    assert "round      2 of 9; served by a broker" in out
    assert "at tcp://127.0.0.1:5557" in out
    assert f"clients    {', '.join(row(1).entry.clients)}" in out
    assert "training loss 1.0000, held-out loss 1.2500, exact match 0.5000" in out
    assert "privacy" not in out


def test_one_that_was_left_says_how_to_go_on_and_a_complete_one_that_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = made(tmp_path / "left", rounds=9, committed=2)
    assert f"2 of 9; no broker is there; go on with it: parablock broker --resume {left.path}" in told(left, capsys)
    assert "2 of 2; complete" in told(made(tmp_path / "complete", rounds=2, committed=2), capsys)


def test_privacy_is_told_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all that is committed, though its rows of metrics still wait for a client's report."""
    spent = epsilon(4.0, 3, 1e-5)
    folder = made(tmp_path, rounds=9, committed=3, reported=1, privacy=PRIVATE)
    assert f"privacy    epsilon {spent:.4g} of 8" in told(folder, capsys)
    assert status_command.main([str(folder.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epsilon"], found["budget"], found["committed"], found["served_by"]) == (spent, 8.0, 3, None)


def test_where_nothing_can_work_it_out_that_is_told_and_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    accountant.epsilon_of.cache_clear()
    out = told(made(tmp_path, rounds=9, committed=3, privacy=PRIVATE), capsys)
    assert "3 of 9" in out
    assert "epsilon unknown (differential privacy needs the package dp-accounting: pip install" in out
    assert "of 8" in out


def test_before_the_first_round_nobody_has_spent_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(made(tmp_path, rounds=9, committed=0, privacy=PRIVATE), capsys)
    assert "0 of 9" in out
    assert "clients    none yet" in out
    assert "epsilon 0 of 8" in out


def test_a_wrong_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_command.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    folder = made(tmp_path, rounds=2, committed=1)
    (folder.path / "journal.sqlite").write_bytes(b"no journal")
    assert status_command.main([str(folder.path)]) == 2
    assert "journal" in capsys.readouterr().err
