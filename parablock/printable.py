"""Somebody else's words for a terminal or a log: on one line, and nothing that a terminal would obey."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text, with what cannot be seen as Python writes it."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
