"""What is a label and what is none, for whichever setting names its field."""

from __future__ import annotations

from typing import Any

import pytest

from workers.labels import label
from workers.sources import DataError

SECRET = "the patient is called"


def found(record: dict[str, Any]) -> str:
    return label(record, "task", setting="eval.task", where="rows.jsonl, row 2")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        (" a", " a"),
        ("1.0", "1.0"),
        (1, "1"),
        (1.0, "1"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (float("inf"), "inf"),
        (True, "True"),
        ("\ud800", "\\ud800"),
        ("x" * 64, "x" * 64),
    ],
)
def test_texts_numbers_and_truth_values_are_labels(value: object, expected: str) -> None:
    assert found({"task": value}) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"task": None}, "has nothing in the field 'task', which eval.task names; fill it in, delete the row, or name"),
        ({"task": ""}, "has nothing in the field 'task'"),
        ({"task": " \t"}, "has nothing in the field 'task'"),
        ({"task": float("nan")}, "has nothing in the field 'task'"),
        (
            {"task": [SECRET]},
            "has a list in the field 'task', which eval.task names; a label is a text, a number, true",
        ),
        ({"task": {SECRET: 1}}, "has a dict in the field 'task'"),
        ({"task": SECRET.encode()}, "has a bytes in the field 'task'"),
        ({"task": SECRET * 5}, "has 105 characters in the field 'task', which eval.task names; a label has at most 64"),
        ({"text": SECRET, "a": 1}, "has no field 'task', which eval.task names; it has a, text; name one"),
        ({SECRET: "x", None: []}, "has no field 'task', which eval.task names; it has 1 that is no plain name"),
        ({}, "has no field 'task', which eval.task names; it has none; name one"),
    ],
)
def test_what_is_no_label_is_told_without_its_text(record: dict[Any, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        found(record)
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl, row 2 {expected}")
    assert message.endswith("as in --set eval.task=NAME")
    assert SECRET not in message
