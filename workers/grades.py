"""How a generated answer compares with its reference.

Where the reference ends in `#### N`, as GSM8K's do, an answer is right if its last `####` is before the same number.
Any other is right if it says what the reference says, but for case, white space, quotes around it and punctuation at
its end; and its ROUGE-L tells how many of the words they have in common, in the same order.
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

# Neither 1/2, 1.2.3, 10:30 nor 1e5 begins with a number.
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(?![.:]?\d|\s*/\s*\d|[eE][+-]?\d)")
# A number, with commas only between thousands (or lakhs), and a unit of two words at most: 5 %, 3 km/h, 20 square feet.
_UNIT = r"[%°€£¥]?[^\W\d_]{0,12}[²³]?([ /][^\W\d_]{1,12})?"
_WANTED = re.compile(rf"\s*(?P<number>-?((\d{{1,3}}(,\d{{2,3}})*,\d{{3}}|\d+)(\.\d+)?|\.\d+))(\.|\s*{_UNIT}\.?)\s*")
_QUOTES = "\"'`“”„‘’«»「」『』"
_ENDS = " .,;:!?。、।"
# What is written without spaces between words: Thai, Lao, Burmese, Khmer, kana, bopomofo and ideographs.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3021-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Soft hyphens, joiners, marks of direction, and variants of a character.
_INVISIBLE = re.compile("[\u00ad\u200c-\u200f\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")


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
    wanted = wanted_number(row.answer)
    if wanted is not None:
        return Answer(row.place, row.task, text, number(text) == wanted, None)
    return Answer(row.place, row.task, text, normalised(text) == normalised(row.answer), rouge_l(text, row.answer))


def wanted_number(reference: str) -> Decimal | None:
    """The number that a reference wants: the one after its last `####`, if nothing but a short unit follows.

    None for any other, as one that has a heading, `#### 1. Introduction`, or ends in `#### 1/2`.
    """
    _, mark, wanted = reference.rstrip().rpartition("####")
    single = len(wanted.splitlines()) == 1
    match = _WANTED.fullmatch(wanted.replace("$", "")) if mark and single else None
    return Decimal(match["number"].replace(",", "")) if match else None


def number(text: str) -> Decimal | None:
    """The number after the last `####` of a generated answer, whatever follows it: 1,000, $1000, 1000.0 and 1000. are
    all the same. None without one."""
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
    R = l / (words of the reference), and the score F = 2PR / (P + R). A word is a run of letters, the marks on them,
    and digits, without case; where a script has no spaces between words, each letter is one. A text without any is
    taken by what stands between its spaces.
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
    words: list[str] = []
    within = False  # whether another letter belongs to the last word
    marked = False  # whether another mark does
    for character in _INVISIBLE.sub("", folded):
        if character.isalnum():
            alone = not character.isdecimal() and _UNSPACED.match(character) is not None
            if within and not alone:
                words[-1] += character
            else:
                words.append(character)
            within, marked = not alone, True
        elif marked and unicodedata.category(character).startswith("M"):
            words[-1] += character
        else:
            within = marked = False
    return words or folded.split()


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
