"""The built-in problems: the same everywhere, right, small, and never in both splits."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from parablock.problems import problems


def test_equal_arguments_give_equal_problems_on_every_machine() -> None:
    rows = problems(200, 7, "train")
    assert rows == problems(200, 7, "train")
    # A change here changes what everybody's built-in runs are compared on.
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "d0de9b14c74b6af0"


def test_a_longer_list_begins_with_the_shorter_one_and_seeds_differ() -> None:
    assert problems(300, 1, "train")[:100] == problems(100, 1, "train")
    assert problems(100, 1, "train") != problems(100, 2, "train")


def test_no_problem_is_in_both_splits_whatever_the_seeds() -> None:
    train = {row["prompt"] for seed in range(4) for row in problems(5000, seed, "train")}
    held_out = {row["prompt"] for seed in range(4) for row in problems(2000, seed, "eval")}
    assert len(held_out) > 4000
    assert not train & held_out


def test_every_step_of_the_reasoning_is_right_and_ends_in_the_answer() -> None:
    for row in problems(2000, 3, "train"):
        reasoning, _, answer = row["completion"].partition("\n#### ")
        results = []
        for step in reasoning.split(", "):
            match = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step)
            assert match is not None, step
            a, b = int(match[1]), int(match[3])
            results.append(int(match[4]))
            assert results[-1] == {"+": a + b, "-": a - b, "*": a * b}[match[2]]
        assert int(answer) == results[-1] > 0


def test_the_numbers_of_the_story_are_those_of_the_reasoning() -> None:
    for row in problems(500, 3, "eval"):
        story = re.findall(r"\d+", row["prompt"])
        assert set(story) <= set(re.findall(r"\d+", row["completion"]))


def test_rows_are_short_ascii() -> None:
    lengths = [len((row["prompt"] + row["completion"]).encode("ascii")) for row in problems(3000, 0, "train")]
    assert max(lengths) < 100


def test_no_answer_is_common_enough_to_be_guessed() -> None:
    answers = [row["completion"].rpartition(" ")[2] for row in problems(2000, 0, "eval")]
    assert max(answers.count(answer) for answer in set(answers)) < 0.2 * len(answers)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be train or eval, got 'test'"):
        problems(1, 0, "test")  # type: ignore[arg-type]
