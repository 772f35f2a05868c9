"""How answers compare with their references: numbers, normalised text, and ROUGE-L against slow and known values."""

from __future__ import annotations

import itertools
import json
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.grades import Answer, grade, longest_common, normalised, number, rouge_l, wanted_number
from workers.rows import Row

WORDS = st.lists(st.sampled_from("abcd"), max_size=9)


def row(answer: str) -> Row:
    return Row(3, np.zeros(2, np.int32), np.ones(2, np.bool_), 1, answer, "task")


def is_within(part: tuple[str, ...], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


@given(WORDS, WORDS)
def test_the_longest_common_sequence_is_the_longest_that_there_is(first: list[str], second: list[str]) -> None:
    lengths = range(len(first), -1, -1)
    parts = itertools.chain.from_iterable(itertools.combinations(first, length) for length in lengths)
    assert longest_common(first, second) == len(next(part for part in parts if is_within(part, second)))
    assert longest_common(first, second) == longest_common(second, first)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # The three of Lin 2004, section 3.1, against "police killed the gunman": 3 of 4 words, 2 of 4, 2 of 4.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        # P = 2/5, R = 2/3: F = 2 * (4/15) / (16/15)
        ("the cat is here now", "The cat sat.", 1 / 2),
        ("Yes", "yes, it does", 1 / 2),
        ("FEBRUARY 5 1953", "February 5, 1953", 1),
        ("Zürich, Straße", "zürich STRASSE", 1),
        ("не знаю", "Я не знаю", 4 / 5),
        ("?", "!", 0),
        ("🙂", "🙂", 1),
        ("❤️", "☀️", 0),
        # No spaces between words: by the letter, 5 of 5 and 6.
        ("今天天气很好", "今天天气好", 10 / 11),
        ("ラーメン", "ラメン", 6 / 7),
        ("ง่าย", "งาย", 4 / 6),  # a tone belongs to its letter
        ("买 iPhone15", "買 iphone15", 2 / 4),
        # Marks belong to their words, of which none is another without them.
        ("मैं हिन्दी बोलता हूँ", "मैं हिन्दी हूँ", 6 / 7),
        ("की", "का", 0),
        ("مَرْحَبًا بِكَ", "مَرْحَبًا", 2 / 3),
        ("क्\u200dष ख", "क्ष", 2 / 3),
        ("", "anything", 0),
        ("", "", 0),
    ],
)
def test_rouge_l_by_hand(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)


@given(st.text(max_size=30), st.text(max_size=30))
def test_rouge_l_is_symmetric_and_within_bounds(first: str, second: str) -> None:
    assert 0 <= rouge_l(first, second) == rouge_l(second, first) <= 1
    if first.strip():
        assert rouge_l(first, first) == 1


@given(*[st.text(st.characters(max_codepoint=127), max_size=30)] * 2)
def test_words_of_ascii_are_runs_of_letters_and_digits(first: str, second: str) -> None:
    said, wanted = (re.findall("[a-z0-9]+", text.lower()) or text.lower().split() for text in (first, second))
    common = longest_common(said, wanted)
    assert rouge_l(first, second) == (2 * common / (len(said) + len(wanted)) if common else 0)


@given(WORDS, WORDS)
def test_all_words_in_common_is_1_and_none_0(first: list[str], second: list[str]) -> None:
    score = rouge_l(" ".join(first), " ".join(second))
    assert (score == 1) == (first == second != [])
    assert (score == 0) == (not set(first) & set(second))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Positive", "positive"),
        ("  the\n  Other  one ", "the other one"),
        ('"Positive."', "positive"),
        ("'positive' .", "positive"),
        ("“Yes!”", "yes"),
        ("「東京。」", "東京"),
        ("東京。", "東京"),
        ("ＹＥＳ", "yes"),
        ("-5", "-5"),
        ("5.", "5"),
        (".5", ".5"),
        ("C++", "c++"),
        ("(a) or (b)?", "(a) or (b)"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_what_counts_of_a_text(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_a_reference_with_a_number_wants_that_number_and_any_other_its_text() -> None:
    assert grade(row("It is\n#### 7"), "so 7 #### 7.0") == Answer(3, "task", "so 7 #### 7.0", True, None)
    assert grade(row("#### 7"), "7") == Answer(3, "task", "7", False, None)
    assert grade(row("positive"), "Positive.") == Answer(3, "task", "Positive.", True, 1.0)
    assert grade(row("not good"), "good") == Answer(3, "task", "good", False, pytest.approx(2 / 3))
    heading = "#### 1. Introduction\nLong prose."
    assert grade(row(heading), heading) == Answer(3, "task", heading, True, 1.0)
    assert grade(row("#### 7"), heading.replace("1", "7")).right, "whatever an answer says after its number"
    assert grade(row("7"), "#### 8") == Answer(3, "task", "#### 8", False, 0.0)
    assert "secret" not in repr(grade(row("x"), "secret"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 18", "18"),
        ("She has <<1+1=2>>2 left.\n#### 2", "2"),
        ("#### 1\n#### 2", "2"),
        ("####1,234", "1234"),
        ("#### $5.00", "5"),
        ("#### $-5", "-5"),
        ("#### -5.", "-5"),
        ("#### .5 km", "0.5"),
        ("#### 007", "7"),
        ("#### 12apples", "12"),
        ("18", None),
        ("#### none", None),
        ("####", None),
        ("#### 1 #### x", None),
        ("####\n1. so", "1"),
        ("#### 1/2", None),
        ("#### 12 / 34", None),
        ("#### 1.2.3", None),
        ("#### 10:30", None),
        ("#### 1e5", None),
    ],
)
def test_the_number_after_the_last_mark(text: str, expected: str | None) -> None:
    assert number(text) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("so\n#### 18", "18"),
        ("#### 1\n#### 2 \n\n", "2"),
        ("####1,234", "1234"),
        ("#### 12,34,567", "1234567"),
        ("#### $5.00", "5"),
        ("#### -$5", "-5"),
        ("#### -5.", "-5"),
        ("#### .5 km", "0.5"),
        ("#### 12apples", "12"),
        ("#### 50%", "50"),
        ("#### 30 km/h.", "30"),
        ("#### 20 square feet", "20"),
        ("#### 3 m²", "3"),
        ("18", None),
        ("####", None),
        ("####\n5", None),
        ("#### 1. Introduction\nLong prose.", None),
        ("#### 1. Introduction", None),
        ("#### 7\nand so on", None),
        ("#### 7 as one of them has left", None),
        ("#### 1,2", None),
        ("#### 1/2", None),
        ("#### 1.2.3", None),
        ("#### 10:30", None),
        ("#### 1 #### x", None),
    ],
)
def test_a_reference_is_a_number_only_if_nothing_but_a_unit_follows(reference: str, expected: str | None) -> None:
    assert wanted_number(reference) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train.jsonl"])
def test_all_references_of_gsm8k_are_numbers(name: str) -> None:
    file = Path("/work/shared/data") / name
    if not file.is_file():
        pytest.skip(f"needs {file}")
    for line in file.read_text().splitlines():
        answer = json.loads(line)["answer"]
        assert wanted_number(answer) == number(answer) == Decimal(answer.rpartition("#### ")[2].replace(",", ""))
