"""Robust aggregation the slow and obvious way, number by number: what the kernels of `parablock.robust` are held
against."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Vectors = Sequence[Iterable[float]]


def median(deltas: Vectors) -> list[float]:
    return [statistics.median(column) for column in _columns(deltas)]


def trimmed_mean(deltas: Vectors, cut: int) -> list[float]:
    return [statistics.fmean(sorted(column)[cut : len(column) - cut]) for column in _columns(deltas)]


def krum(deltas: Vectors, bad: int, count: int) -> list[int]:
    """Places of the chosen."""
    vectors = [list(map(float, delta)) for delta in deltas]
    scores = []
    for place, one in enumerate(vectors):
        apart = sorted(math.dist(one, other) ** 2 for number, other in enumerate(vectors) if number != place)
        scores.append((sum(apart[: len(vectors) - bad - 2]), place))
    return sorted(place for _, place in sorted(scores)[:count])


def norm(delta: Iterable[float]) -> float:
    return math.hypot(*map(float, delta))


def _columns(deltas: Vectors) -> list[tuple[float, ...]]:
    return list(zip(*([float(value) for value in delta] for delta in deltas), strict=True))
