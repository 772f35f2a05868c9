"""Scores as a tree and as a table, by file and by task."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parablock.scores import Scores, total
from tests.shown import shown
from workers.scorecard import Scorecard

QA = Scores(loss_sum=6.0, tokens=3, correct=1, answered=2, rouge_sum=0.5, free_form=1, rows=4)
SUMS = Scores(loss_sum=4.0, tokens=2, correct=1, answered=1, rows=1)
counts = st.integers(0, 50)
scores = st.builds(Scores, counts.map(float), counts, counts, counts, counts.map(float), counts, counts)


def lines(card: Scorecard) -> list[list[str]]:
    return [line.split() for line in shown(card.table("title")).splitlines() if line.strip()]


def test_one_file_without_tasks_has_no_branches() -> None:
    card = Scorecard({"a.jsonl": {"": QA}}, by_task=False)
    assert card.tree() == {
        "rows": 4, "tokens": 3, "loss": 2.0, "perplexity": pytest.approx(7.389056), "exact_match": 0.5, "answered": 2,
        "rouge_l": 0.5, "free_form": 1,
    }  # fmt: skip
    title, *heading, _rule, numbers = lines(card)
    assert title == ["title"]
    assert [word for line in heading for word in line] == [
        "exact", "rows", "tokens", "loss", "perplexity", "answered", "match", "ROUGE-L",
    ]  # fmt: skip
    assert numbers == ["all", "4", "3", "2.0000", "7.39", "2", "50.0%", "0.500"]


def test_tasks_of_several_files_are_each_told_and_added_up() -> None:
    card = Scorecard({"a": {"qa": QA, "b": SUMS}, "b": {"qa": SUMS}}, by_task=True)
    tree = card.tree()
    assert list(tree["tasks"]) == ["b", "qa"]
    assert (tree["rows"], tree["answered"], tree["exact_match"], tree["rouge_l"]) == (6, 4, 0.75, 0.5)
    assert (tree["tasks"]["qa"]["rows"], tree["tasks"]["qa"]["loss"]) == (5, 2.0)
    assert tree["files"]["a"]["tasks"]["qa"] == Scorecard({"": {"": QA}}, by_task=False).tree()
    assert list(tree["files"]["b"]) == [*tree["files"]["b"]["tasks"]["qa"], "tasks"]
    found = [line[:2] for line in lines(card) if len(line) == 8]
    expected = [["a", "5"], ["b", "1"], ["qa", "4"], ["b", "1"], ["qa", "1"], ["all", "6"], ["b", "1"], ["qa", "5"]]
    assert found == expected


@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), scores), min_size=2))
def test_files_and_tasks_add_up_to_all(files: dict[str, dict[str, Scores]]) -> None:
    tree = Scorecard(files, by_task=True).tree()
    whole = total(each for tasks in files.values() for each in tasks.values())
    for name in ("rows", "tokens", "answered", "free_form"):
        assert tree[name] == getattr(whole, name)
        assert tree[name] == sum(task[name] for task in tree["tasks"].values())
        assert tree[name] == sum(file[name] for file in tree["files"].values())
        assert tree[name] == sum(task[name] for file in tree["files"].values() for task in file["tasks"].values())
    assert tree["loss"] == (pytest.approx(whole.loss) if whole.tokens else None)


def test_what_is_not_known_is_null_and_a_dash() -> None:
    card = Scorecard({"a": {"": Scores(loss_sum=1e6, tokens=1, rows=1)}}, by_task=False)
    assert json.loads(json.dumps(card.tree(), allow_nan=False))["perplexity"] is None
    assert lines(card)[4] == ["all", "1", "1", "1000000.0000", "–", "0", "–", "–"]
    assert "nothing was answered: of the first eval.generate rows" in shown(card.table("title"))
    assert Scorecard({"a": {}}, by_task=False).tree()["loss"] is None


def test_rows_fewer_than_answers_are_explained() -> None:
    fewer = Scorecard({"a": {"": Scores(loss_sum=1.0, tokens=1, answered=2, rows=1)}}, by_task=False)
    assert "rows: those of the loss" in shown(fewer.table("title"))
    assert fewer.tree()["rows"] == 1
    assert "rows:" not in shown(Scorecard({"a": {"": QA}}, by_task=False).table("title"))


def test_names_are_no_markup_and_no_commands_to_a_terminal() -> None:
    text = shown(Scorecard({"a": {"[red]x\x1b[2J": QA, "[b]": SUMS}}, by_task=True).table("[i]title"))
    assert r"'[red]x\x1b[2J'" in text
    assert "[b]" in text
    assert "[i]title" in text
