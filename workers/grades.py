"""How a generated answer compares with its reference.

Where the reference ends in `#### N`, as GSM8K's do, an answer is right if it ends in the same number. Any other answer
is right if it says what the reference says, but for case, white space, quotes around it and punctuation at its end;
and its ROUGE-L tells how many of the words they have in common, in the same order.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.rows import Row

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_WORD = re.compile(r"[^\W_]+")
_QUOTES = "\"'`“”„‘’«»"
_ENDS = " .,;:!?"


@dataclass(frozen=True)
class Answer:
    """An answered row. place, task: the row's. rouge_l: 0 to 1; None where the reference is a number."""

    place: int
    task: str
    text: str = field(repr=False)
    right: bool
    rouge_l: float | None


def grade(row: Row, text: str) -> Answer:
    """`text` as the answer to `row`."""
    wanted = number(row.answer)
    if wanted is not None:
        return Answer(row.place, row.task, text, number(text) == wanted, None)
    return Answer(row.place, row.task, text, normalised(text) == normalised(row.answer), rouge_l(text, row.answer))


def number(text: str) -> Decimal | None:
    """The number after the last `####`: 1,000, $1000, 1000.0 and 1000. are all the same. None without one."""
    _, mark, answer = text.rpartition("####")
    match = _NUMBER.match(answer.strip().replace(",", "").replace("$", "")) if mark else None
    return Decimal(match[0]) if match else None


def normalised(text: str) -> str:
    """The text by which answers are compared: NFKC, without case, any white space one space, no quotes around it and
    no punctuation at its end. What stands within it counts: -5 is not 5, and C++ is not C."""
    folded = " ".join(_folded(text).split())
    return folded.rstrip(_QUOTES + _ENDS).lstrip(_QUOTES) or folded


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L, from 0 to 1 (Lin 2004, https://aclanthology.org/W04-1013, section 3.1, with beta = 1).

    With l words in the longest common subsequence, precision is P = l / (words of the answer), recall
    R = l / (words of the reference), and the score F = 2PR / (P + R). A word is a run of letters and digits, without
    case; a text that has none is taken by what stands between its spaces.
    """
    said, wanted = _words(answer), _words(reference)
    common = longest_common(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest sequence that both have, in order but not necessarily in one piece."""
    lengths = [0] * (len(second) + 1)  # by how many of the second's words, with those of the first so far
    for word in first:
        before = 0  # lengths[place - 1] without this word
        for place, other in enumerate(second, start=1):
            longest = before + 1 if word == other else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longest
    return lengths[-1]


def _words(text: str) -> list[str]:
    folded = _folded(text)
    return _WORD.findall(folded) or folded.split()


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
