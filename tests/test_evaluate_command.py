"""`parablock evaluate`: a model folder, a run's folder, and what it says of wrong input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import builtin
from parablock.block_file import Label
from parablock.blocks import partition, read_block
from parablock.config import from_dict
from parablock.run_folder import RunFolder
from workers.evaluate_command import main

if TYPE_CHECKING:
    from pathlib import Path


def scores(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_model_by_its_folder_or_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builtin.model(0).save_pretrained(tmp_path)
    builtin.tokenizer().save_pretrained(tmp_path)
    settings = (
        "--data",
        "builtin",
        "--set",
        "eval.rows=5",
        "--set",
        "eval.generate=3",
        "--set",
        "eval.max_new_tokens=4",
    )
    by_name = scores(capsys, "builtin", *settings)
    assert by_name == scores(capsys, str(tmp_path), *settings)
    assert list(by_name) == ["rows", "tokens", "loss", "perplexity", "exact_match", "answered"]
    assert (by_name["rows"], by_name["answered"], by_name["exact_match"]) == (5, 3, 0.0)
    assert by_name["perplexity"] == pytest.approx(np.exp(by_name["loss"]))


def test_a_run_is_evaluated_with_its_blocks_and_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_dict({"data": {"eval": "builtin"}, "eval": {"rows": 4}})
    before = scores(capsys, "builtin", "--data", "builtin", "--set", "eval.rows=4")
    model = builtin.model(config.seed)
    manifest = partition(model, config.blocks)
    folder = RunFolder.create(tmp_path / "run", config)
    folder.write_manifest(manifest)
    for block in manifest.blocks:
        folder.save_block(Label(block.index, 0, -1, manifest.digest), read_block(model, block).numpy())
    assert scores(capsys, str(folder.path)) == before
    # Without its head's block the model can only guess.
    last = manifest.blocks[-1]
    folder.save_block(Label(last.index, 1, 0, manifest.digest), np.zeros(last.numel, dtype=np.float32))
    assert scores(capsys, str(folder.path))["loss"] == pytest.approx(np.log(259))
    assert scores(capsys, str(folder.path), "--set", "eval.rows=2")["rows"] == 2


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["builtin", "--data", "builtin", "--set", "eval.rows=2"]) == 0
    captured = capsys.readouterr()
    assert "held-out scores of builtin" in captured.out
    assert "not asked" in captured.out
    assert "held-out rows: 2 of 2 rows used" in captured.err


def test_wrong_input_is_told_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    rows = str(tmp_path / "rows.jsonl")
    assert "there are no held-out rows" in refusal(capsys, "builtin")
    assert "has no config.json" in refusal(capsys, str(tmp_path), "--data", "builtin")
    assert "no setting eval.row" in refusal(capsys, "builtin", "--set", "eval.row=3")
    assert "--set data.prompt=question" in refusal(capsys, "builtin", "--data", rows)
    RunFolder.create(tmp_path / "run", from_dict({"data": {"eval": "builtin"}}))
    assert "holds no trained block" in refusal(capsys, str(tmp_path / "run"))
