"""What a worker loads by the broker's settings, and what it agrees to tell."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from parablock import config
from workers.rows import DataError
from workers.setup import Local, prepare

if TYPE_CHECKING:
    from pathlib import Path


def tasks(path: Path, count: int, *, tell: bool) -> set[str]:
    """The tasks of the held-out rows, of which there are so many different ones, as a worker holds them."""
    rows = [{"prompt": "1 + 1", "completion": "2", "kind": f"kind {place % count}"} for place in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    terms = config.from_dict({"eval": {"task": "kind", "rows": 0}})
    local = Local("c", str(path), str(path), (0, 1), "", "cpu", 1, False, tell)
    held_out = prepare(json.dumps(config.to_dict(terms, shared_only=True)), local).held_out
    assert held_out is not None
    return {row.task for row in held_out}


def test_labels_are_read_only_where_the_worker_agrees_to_tell_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker names the field, and could name any."""
    with caplog.at_level("INFO", logger="worker"):
        assert tasks(tmp_path / "rows.jsonl", 128, tell=False) == {""}
    assert "scores by the field 'kind'; its labels stay here (--tell-tasks tells them)" in caplog.text


@pytest.mark.parametrize(
    ("answer", "generate", "told"),
    [("2", 4, True), ("#### 2", 4, False), ("2", 0, False)],
    ids=["words", "number", "none"],
)
def test_rows_that_a_run_cannot_grade_are_told(
    answer: str, generate: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1", "completion": answer}) + "\n", encoding="utf-8")
    terms = config.to_dict(config.from_dict({"eval": {"generate": generate}}), shared_only=True)
    with caplog.at_level("INFO", logger="worker"):
        prepare(json.dumps(terms), Local("c", str(path), str(path), (0, 1), "", "cpu", 1, False))
    assert ("none of these rows is answered during the run" in caplog.text) == told


def test_more_tasks_than_a_message_holds_are_refused(tmp_path: Path) -> None:
    assert len(tasks(tmp_path / "rows.jsonl", 128, tell=True)) == 128
    with pytest.raises(DataError, match=r"eval\.task = 'kind' tells 129 tasks apart, and at most 128 are told"):
        tasks(tmp_path / "rows.jsonl", 129, tell=True)


@pytest.mark.parametrize("terms", ["{", "[" * 100_000, "[]", '{"rounds": 0}'], ids=["torn", "nested", "list", "zero"])
def test_a_broker_may_say_anything(terms: str) -> None:
    with pytest.raises(config.ConfigError):
        prepare(terms, Local("c", "builtin", "", (0, 1), "", "cpu", 1, False))
