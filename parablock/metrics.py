"""What the rows of metrics.jsonl say together. A row is a dictionary; any number in it may be None."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def hidden_share(rounds: Iterable[Mapping[str, Any]]) -> float | None:
    """1 − exposed / communication, from 0 to 1, over all rounds that tell both; None where none does."""
    told = [row for row in rounds if row.get("comm_s") and row.get("exposed_s") is not None]
    total = sum(row["comm_s"] for row in told)
    return max(1.0 - sum(row["exposed_s"] for row in told) / total, 0.0) if total > 0 else None
