"""`parablock evaluate`: a model folder, a run's folder, tasks, files, answers that are kept, and wrong input."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import builtin
from parablock.block_file import Label
from parablock.blocks import partition, read_block
from parablock.config import from_dict
from parablock.run_folder import RunFolder
from workers.answers import AnswerFile
from workers.evaluate_command import main

if TYPE_CHECKING:
    from pathlib import Path

    from workers.grades import Answer

SMALL = ("--set", "eval.task=task", "--set", "eval.rows=4", "--set", "eval.generate=5", "--set", "eval.batch_size=2")
SMALL += ("--set", "eval.max_new_tokens=3")


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """Two files of one name, with rows of several tasks."""
    paths = []
    for client, tasks in (("a", ["qa", "sums", "qa", "title", "sums"]), ("b", ["qa", "qa", "qa"])):
        (tmp_path / client).mkdir()
        paths.append(tmp_path / client / "rows.jsonl")
        with paths[-1].open("w") as file:
            for place, task in enumerate(tasks):
                completion = f"#### {place}" if task == "sums" else "some words" * (place + 1)
                file.write(json.dumps({"task": task, "prompt": "x" * place, "completion": completion}) + "\n")
    return [str(path) for path in paths]


def scores(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def stored_run(path: Path) -> RunFolder:
    """A run whose blocks are as its base model has them."""
    config = from_dict({"data": {"eval": "builtin"}, "eval": {"rows": 4}})
    model = builtin.model(config.seed)
    manifest = partition(model, config.blocks)
    folder = RunFolder.create(path, config)
    folder.write_manifest(manifest)
    for block in manifest.blocks:
        folder.blocks.save(Label(block.index, 1, manifest.digest), {"block": read_block(model, block).numpy()})
    return folder


def forget_head(folder: RunFolder) -> None:
    """Without its head's block the model can only guess."""
    last = folder.manifest().blocks[-1]
    zeros = np.zeros(last.numel, dtype=np.float32)
    folder.blocks.save(Label(last.index, 2, folder.manifest().digest), {"block": zeros})


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
    assert list(by_name) == [
        "rows", "tokens", "loss", "perplexity", "exact_match", "answered", "rouge_l", "free_form",
    ]  # fmt: skip
    assert (by_name["rows"], by_name["answered"], by_name["exact_match"]) == (5, 3, 0.0)
    assert by_name["perplexity"] == pytest.approx(np.exp(by_name["loss"]))


def test_a_run_is_evaluated_with_its_blocks_and_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = scores(capsys, "builtin", "--data", "builtin", "--set", "eval.rows=4")
    folder = stored_run(tmp_path / "run")
    assert scores(capsys, str(folder.path)) == before
    forget_head(folder)
    assert scores(capsys, str(folder.path))["loss"] == pytest.approx(np.log(259))
    assert scores(capsys, str(folder.path), "--set", "eval.rows=2")["rows"] == 2


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["builtin", "--data", "builtin", "--set", "eval.rows=2"]) == 0
    captured = capsys.readouterr()
    assert "held-out scores of builtin" in captured.out
    assert "nothing was answered" in captured.out
    assert "held-out rows: 2 of 2 rows used" in captured.err


def test_wrong_input_is_told_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    rows = str(tmp_path / "rows.jsonl")
    assert "there are no held-out rows" in refusal(capsys, "builtin")
    assert "has no config.json" in refusal(capsys, str(tmp_path), "--data", "builtin")
    assert "no setting eval.row" in refusal(capsys, "builtin", "--set", "eval.row=3")
    assert "--set data.prompt=question" in refusal(capsys, "builtin", "--data", rows)
    assert "row 1 has no field 'task', which eval.task names; it has completion, prompt" in refusal(
        capsys, "builtin", "--data", "builtin", "--set", "eval.task=task"
    )
    assert "--data names the same rows twice" in refusal(capsys, "builtin", "--data", "builtin", "--data", "builtin")
    assert "eval.generate = 0 asks for none" in refusal(
        capsys, "builtin", "--data", "builtin", "--answers", str(tmp_path / "answers.jsonl")
    )
    (tmp_path / "link.jsonl").symlink_to(rows)
    for again in (f"{tmp_path}/./rows.jsonl", str(tmp_path / "link.jsonl")):
        told = refusal(capsys, "builtin", "--data", rows, "--data", again)
        assert f"names the same rows twice: {rows} and {again} are one; name each of them once" in told
    many = tmp_path / "many.jsonl"
    many.write_text("".join(f'{{"id": {each}, "prompt": "x", "completion": "y"}}\n' for each in range(1001)))
    assert "eval.task = 'id' tells 1001 tasks apart" in refusal(
        capsys, "builtin", "--data", str(many), "--set", "eval.task=id", "--set", "eval.rows=0"
    )
    RunFolder.create(tmp_path / "run", from_dict({"data": {"eval": "builtin"}}))
    assert "holds no trained block" in refusal(capsys, str(tmp_path / "run"))


def test_tasks_and_files_are_told_apart(rows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    both = scores(capsys, "builtin", "--data", rows[0], "--data", rows[1], *SMALL)
    assert list(both["files"]) == rows, "the same name twice, so the whole paths"
    assert {task: each["rows"] for task, each in both["tasks"].items()} == {"qa": 5, "sums": 1, "title": 1}, "eval.rows"
    assert both["files"][rows[0]]["tasks"]["sums"]["free_form"] == 0
    for place, path in enumerate(rows):
        alone = scores(capsys, "builtin", "--data", path, *SMALL)
        assert both["files"][path] == alone
        assert alone["answered"] == [4, 2][place], "the first prompt of each is empty, so it asks nothing"
    assert main(["builtin", "--data", rows[0], "--data", rows[1], *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("sums") == 2
    assert f"held-out rows of {rows[1]}: 3 of 3 rows used" in captured.err


def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_end(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    command = ("builtin", "--data", rows[0], "--data", rows[1], *SMALL, "--answers", str(path))
    expected = scores(capsys, *command)
    assert expected == scores(capsys, *command[:-2])
    content = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    assert len(ends) == 1 + expected["answered"]
    for end in ends:
        for cut in (end, end - 7):
            path.write_bytes(content[:cut])
            assert main([*command, "--json"]) == 0
            captured = capsys.readouterr()
            assert json.loads(captured.out) == expected
            assert path.read_bytes() == content
            assert ("its last line was cut off and is dropped" in captured.err) == (cut != end)
            answers = max(content[:cut].count(b"\n") - 1, 0)
            assert (f"goes on after {answers} of 6 answers" in captured.err) == (answers > 0)


def test_ctrl_c_keeps_what_was_answered(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.jsonl"
    command = ["builtin", "--data", rows[0], *SMALL, "--answers", str(path)]
    append = AnswerFile.append

    def interrupted(file: AnswerFile, name: str, answers: list[Answer]) -> None:
        append(file, name, answers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "append", interrupted)
        assert main(command) == 75
    assert f"interrupted; the same command goes on with what is in {path}" in capsys.readouterr().err
    assert path.read_bytes().count(b"\n") == 3
    assert main(command) == 0
    assert "goes on after 2 of 4 answers" in capsys.readouterr().err


def test_a_file_whose_name_is_no_utf8_is_answered_and_gone_on_with(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / os.fsdecode(b"z\xfclich.jsonl")
    shutil.copy(rows[0], data)
    command = ["builtin", "--data", str(data), *SMALL, "--answers", str(tmp_path / "answers.jsonl")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == shown
    assert "goes on after 4 of 4 answers" in captured.err


def test_an_answer_file_that_another_evaluation_writes_is_refused(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    command = ["builtin", "--data", rows[0], *SMALL, "--answers", str(path)]
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written by another `parablock evaluate`" in refusal(capsys, *command)
        assert path.read_bytes() == b""
    assert main(command) == 0


def test_answers_of_another_evaluation_are_refused(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "answers.jsonl")
    command = ["builtin", "--data", rows[0], *SMALL, "--answers", path]
    assert main(command) == 0
    capsys.readouterr()
    assert "What differs: the model's weights (" in refusal(capsys, *command, "--set", "seed=1")
    assert "What differs: the rows that are asked (" in refusal(capsys, *command, "--set", "data.template=Q: {prompt}")
    assert "eval.max_new_tokens (3 there, 4 here)" in refusal(capsys, *command, "--set", "eval.max_new_tokens=4")
    assert "holds something else than answers" in refusal(capsys, *command[:-1], rows[0])
