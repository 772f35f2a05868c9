"""A list in a module's docstring: numbered rows, and under each the tests that show it, by module and name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent


def check(docstring: str | None, rows: int) -> None:
    """Assert that it has so many rows, each with tests, that there is each of those, and no line that says nothing."""
    listed = read(docstring or "")
    assert list(listed) == list(range(1, rows + 1))
    assert all(listed.values())
    named = {module for tests in listed.values() for module, _ in tests}
    there = {module: set(functions(TESTS / f"{module}.py")) for module in named}
    assert [test for tests in listed.values() for test in tests if test[1] not in there[test[0]]] == []
    lines = [line for line in (docstring or "").splitlines()[1:] if line.strip()]
    assert len(lines) == len(listed) + sum(map(len, listed.values())), "a line that is not understood"


def read(docstring: str) -> dict[int, list[tuple[str, str]]]:
    """By row: module and test."""
    listed: dict[int, list[tuple[str, str]]] = {}
    row = 0
    for line in docstring.splitlines():
        if begins := re.fullmatch(r" *(\d+)  \S.*", line):
            row = int(begins[1])
            listed[row] = []
        elif shown := re.fullmatch(r" +(test_\w+) +(test_\w+)", line):
            listed[row].append((shown[1], shown[2]))
    return listed


def functions(path: Path) -> Iterator[str]:
    """Names of the functions of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
