"""The file of answers: what is in it comes back, what is torn is dropped, and nobody else's answers are mixed in."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from parablock import builtin, models
from parablock.append_file import AppendFile
from parablock.models import Loaded
from parablock.sections import Evaluation
from workers.answers import AnswerFile, AnswerFileError, identity
from workers.grades import Answer
from workers.rows import Row

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY: dict[str, Any] = {
    "answers": 2,
    "weights": "a" * 64,
    "model_config": "e" * 64,
    "generation_config": "f" * 64,
    "tokenizer": "b" * 64,
    "end_tokens": [258],
    "max_new_tokens": 8,
    "batch_size": 2,
    "device": "cpu",
    "files": ["x.jsonl", "y.jsonl"],
    "rows": "c" * 64,
}
BATCHES = [
    ("x.jsonl", [Answer(4, "qa", "zwölf\n#### 12", True, None), Answer(0, "", '"', False, 0.25)]),
    ("y.jsonl", [Answer(0, "qa", "", False, 0.0)]),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, IDENTITY) as file:
        for name, answers in BATCHES:
            file.append(name, answers)
    return path


def refusal(path: Path, **changes: Any) -> str:
    before = path.read_bytes()
    with pytest.raises(AnswerFileError) as caught:
        AnswerFile(path, IDENTITY | changes)
    assert path.read_bytes() == before
    return str(caught.value)


def test_what_was_appended_is_known_to_the_next_one(path: Path) -> None:
    with AnswerFile(path, IDENTITY) as file:
        assert (len(file), file.torn) == (3, 0)
        assert file.known("x.jsonl") == {4: "zwölf\n#### 12", 0: '"'}
        assert file.known("y.jsonl") == {0: ""}
        assert file.known("z.jsonl") == {}
    assert "zwölf" in path.read_text(encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4


def test_a_file_cut_off_anywhere_is_what_was_whole_of_it(path: Path) -> None:
    content = path.read_bytes()
    header = content.index(b"\n")
    for length in [*range(0, header, 50), *range(header, len(content), 3)]:
        path.write_bytes(content[:length])
        whole = content[:length].rfind(b"\n") + 1
        lines = content[:whole].count(b"\n")
        with AnswerFile(path, IDENTITY) as file:
            assert (len(file), file.torn) == (max(lines - 1, 0), length - whole)
        assert path.read_bytes() == content[: whole or header + 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weights": "d" * 64}, r"the model's weights \(aaaaaaaaaaaa… there, dddddddddddd… here\)\. "),
        ({"model_config": "d" * 64}, r"differs: the model's config \(eeeeeeeeeeee… there, dddddddddddd… here\)\. "),
        ({"generation_config": "d" * 64}, r"differs: the model's generation config \(ffffffffffff… there"),
        ({"tokenizer": "d" * 64}, r"the tokenizer \("),
        ({"end_tokens": [2, 258]}, r"the tokens that end an answer \(\[258\] there, \[2, 258\] here\)"),
        ({"max_new_tokens": 16}, r"differs: eval\.max_new_tokens \(8 there, 16 here\)\. Choose another --answers"),
        ({"batch_size": 1, "rows": "d" * 64}, r"eval\.batch_size \(2 there, 1 here\); the rows that are asked \("),
        ({"device": "cuda"}, r"differs: the device \(cpu there, cuda here\)\. "),
        ({"files": ["x.jsonl"]}, r"the names of the data \("),
    ],
)
def test_answers_of_another_evaluation_are_refused_with_what_differs(
    path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(AnswerFileError, match=expected):
        AnswerFile(path, IDENTITY | changes)
    with path.open("a") as file:
        file.write("torn")
    refusal(path, **changes)


@pytest.mark.parametrize(
    "content", [b'{"prompt": "x", "completion": "y"}\n', b'{"prompt": "x"}', b"\xff\n\n", b"[1]\n", b"\n"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert "holds something else than answers; choose another --answers" in refusal(path)


def test_a_damaged_line_and_another_version_are_told(path: Path) -> None:
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], b'{"data": "x.jsonl"}', *lines[2:]]))
    assert "line 3 is no answer; delete that line" in refusal(path)
    path.write_bytes(b'{"answers": 1}\n')
    assert "was written by another version" in refusal(path)


def test_two_evaluations_at_a_time_do_not_share_a_file(path: Path, tmp_path: Path) -> None:
    with AnswerFile(path, IDENTITY) as first:
        assert "is being written by another `parablock evaluate` that still runs; wait for its end" in refusal(path)
        first.append("y.jsonl", [Answer(1, "", "more", False, 0.0)])
        with AnswerFile(tmp_path / "other.jsonl", IDENTITY):
            pass
    with AnswerFile(path, IDENTITY) as second:
        assert second.known("y.jsonl") == {0: "", 1: "more"}
    refusal(path, batch_size=1)
    with AnswerFile(path, IDENTITY):
        pass  # nor does a refused one keep it


def test_a_name_that_is_no_utf8_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    name = os.fsdecode(b"z\xfclich.jsonl")
    identity = IDENTITY | {"files": [name]}
    with AnswerFile(path, identity) as file:
        file.append(name, [Answer(0, "", "zwölf", True, 1.0)])
    assert "zwölf" in path.read_text(encoding="utf-8")
    with AnswerFile(path, identity) as file:
        assert file.known(name) == {0: "zwölf"}


def test_a_disk_that_refuses_is_told(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnswerFileError, match=r"cannot write .*none/a: .*; choose another --answers"):
        AnswerFile(tmp_path / "none" / "a", IDENTITY)

    def full(_file: AppendFile, _text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AppendFile, "append", full)
    with (
        AnswerFile(path, IDENTITY) as file,
        pytest.raises(AnswerFileError, match="No space left on device; make room, and the same command goes on"),
    ):
        file.append(*BATCHES[0])


def test_the_identity_is_all_that_decides_the_answers() -> None:
    def row(**changes: Any) -> Row:
        whole = Row(0, np.array([1, 2, 3], np.int32), np.ones(3, np.bool_), 2, "answer", "task")
        return dataclasses.replace(whole, **changes)

    loaded = Loaded(builtin.model(0), builtin.tokenizer())
    settings = Evaluation(generate=1)

    def of(loaded: Loaded, questions: dict[str, list[Row]], settings: Evaluation, device: str = "cpu") -> Any:
        return identity(loaded, questions, settings, torch.device(device))

    first = of(loaded, {"a": [row()]}, settings)
    assert first.keys() == IDENTITY.keys()
    assert first == of(loaded, {"a": [row(tokens=np.array([1, 2, 9], np.int32))]}, settings), "no prompt's token"
    others = [
        of(loaded, {"a": [row(**changes)]}, settings)
        for changes in (
            {"place": 1}, {"tokens": np.array([1, 9, 3], np.int32)}, {"prompt": 1}, {"answer": "b"}, {"task": "b"},
        )
    ]  # fmt: skip
    others += [
        of(loaded, {"a": [row(), row(place=1)]}, settings),
        of(loaded, {"b": [row()]}, settings),
        of(loaded, {"a": [row()]}, Evaluation(max_new_tokens=9)),
        of(loaded, {"a": [row()]}, Evaluation(batch_size=9)),
        of(Loaded(builtin.model(1), loaded.tokenizer), {"a": [row()]}, settings),
    ]
    others.append(of(loaded, {"a": [row()]}, settings, "cuda"))
    for change in (
        lambda model: setattr(model.generation_config, "eos_token_id", [3, 258]),
        lambda model: setattr(model.generation_config, "min_new_tokens", 4),
        lambda model: model.config.rope_parameters.update(rope_theta=500000.0),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-5),
    ):
        model = builtin.model(0)
        change(model)
        others.append(of(Loaded(model, loaded.tokenizer), {"a": [row()]}, settings))
    assert len({str(each) for each in [first, *others]}) == len(others) + 1


def test_where_a_model_was_loaded_from_is_no_other_model(tmp_path: Path) -> None:
    model, tokenizer, cpu = builtin.model(0), builtin.tokenizer(), torch.device("cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0"}))
    there = identity(models.load(str(tmp_path), dtype="float32"), {}, Evaluation(), cpu)
    assert there == identity(Loaded(model, tokenizer), {}, Evaluation(), cpu)
