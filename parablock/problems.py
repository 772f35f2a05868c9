"""The built-in data: short arithmetic word problems from a seeded generator, in the style of GSM8K.

Pure Python, the same list on every machine and in every run. A problem has a few words of story, numbers small
enough for a tiny byte-level model, one line of reasoning and the answer after `####`. Training and held-out problems
are disjoint by construction: the hash of a problem's text alone decides which of the two it belongs to, so that no
seed and no count can make them meet. The arithmetic facts (3 + 4) do occur in both; the stories do not.
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal

Split = Literal["train", "eval"]

_EVAL_SHARE = 8
"""One story in so many is held out."""

_NAMES = (
    "Ada", "Amir", "Ana", "Ben", "Bo", "Chen", "Dora", "Eli", "Emma", "Finn", "Gita", "Hugo", "Ida", "Ivan",
    "Jin", "Kai", "Lea", "Leo", "Lin", "Maya", "Mia", "Nia", "Noor", "Omar", "Pia", "Ravi", "Rosa", "Sam",
    "Sara", "Tom", "Uma", "Vera", "Wei", "Yara", "Zoe",
)  # fmt: skip
_THINGS = (
    "apples", "balls", "beads", "books", "boxes", "cakes", "cards", "coins", "cups", "eggs", "fish", "hats",
    "keys", "kites", "lamps", "maps", "nuts", "pears", "pens", "plums", "rings", "rocks", "seeds", "shells",
    "stamps", "toys",
)  # fmt: skip
_GAINS = ("buys", "finds", "gets", "makes", "wins")
_LOSSES = ("breaks", "drops", "gives away", "loses", "sells")
_HOLDERS = ("bags", "cases", "jars", "packs", "rows", "sets")


def problems(count: int, seed: int, split: Split) -> list[dict[str, str]]:
    """`count` rows with the fields `prompt` (the question) and `completion` (reasoning, then `#### N`).

    A pure function of its arguments; a longer list begins with the shorter one. Raises ValueError for an unknown
    split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be train or eval, got {split!r}")
    rng = random.Random(f"parablock problems {split} {seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        prompt, reasoning, answer = _problem(rng)
        if _held_out(prompt) == (split == "eval"):
            rows.append({"prompt": prompt, "completion": f"{reasoning}\n#### {answer}"})
    return rows


def _held_out(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] % _EVAL_SHARE == 0


def _problem(rng: random.Random) -> tuple[str, str, int]:
    """A question, its reasoning and its answer."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    gain, loss, holder = rng.choice(_GAINS), rng.choice(_LOSSES), rng.choice(_HOLDERS)
    kind = rng.choice(("add", "subtract", "multiply", "two steps"))
    if kind == "add":
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        story = rng.choice((f"{name} has {a} {thing} and {gain} {b}.", f"{name} {gain} {a} {thing}, then {b} more."))
        return f"{story} How many now?", f"{a}+{b}={a + b}", a + b
    if kind == "subtract":
        a = rng.randint(2, 9)
        b = rng.randint(1, a - 1)
        return f"{name} has {a} {thing} and {loss} {b}. How many left?", f"{a}-{b}={a - b}", a - b
    if kind == "multiply":
        a, b = rng.randint(2, 5), rng.randint(2, 5)
        return f"{name} has {a} {holder} of {b} {thing}. How many in all?", f"{a}*{b}={a * b}", a * b
    a, b = rng.randint(1, 5), rng.randint(1, 4)
    c = rng.randint(1, a + b - 1)
    story = f"{name} has {a} {thing}, {gain} {b} and {loss} {c}."
    return f"{story} How many left?", f"{a}+{b}={a + b}, {a + b}-{c}={a + b - c}", a + b - c
