"""Robust aggregation: what stands for the mean of n contributions of which up to f may be anything at all.

    rule          bears f bad ones if  its weights        what it makes of contributions Δ_1 … Δ_n
    median        n ≥ 2f + 1           all alike          by element the middle value
    trimmed-mean  n ≥ 2f + 1           all alike          by element the mean without the f largest and f smallest
    krum          n ≥ 2f + 3           one counts         the one that is nearest to its n − f − 2 nearest others
    multi-krum    n ≥ 2f + 3           as in the mean     the mean of the m nearest so, m ≤ n − f − 2

Median and trimmed mean: Yin et al., arXiv 1803.01498, definitions 1 and 2. Krum: Blanchard et al., NIPS 2017 (arXiv
1703.02757), section 4. Multi-Krum and its m: Damaskinos et al., MLSys 2019 (AggregaThor). To bear a bad client means
that the result stays among the honest ones, as far as they agree: where their data differ, what only a few of them know
is left out as well; and f clients that know the others' updates can still push each element by about as much as those
differ (El Mhamdi et al., arXiv 1802.07927).

Cutting contributions to a length (Sun et al., arXiv 1911.07963) goes with each of them, and with the mean, which it
makes bounded, and not robust. Nothing here depends on the order in which contributions came: it is the roster's.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from parablock.aggregation import PIECE, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]
    Matrix = npt.NDArray[np.float64]


def fewest(rule: str, bad: int) -> int:
    """How many contributions a rule needs to bear `bad` bad ones among them."""
    match rule:
        case "median" | "trimmed-mean":
            return 2 * bad + 1
        case "krum" | "multi-krum":
            return 2 * bad + 3
    return 1


def aggregate(
    rule: str,
    bad: int,
    deltas: Sequence[Vector],
    weights: Sequence[int | Fraction],
    steps: Sequence[int] | None,
    factors: Sequence[float],
    out: Vector | None = None,
) -> Vector:
    """What stands for the deltas that count, each times its factor. weights, steps: as in `weighted_mean`, for those
    rules that know them."""
    match rule:
        case "median":
            return median(deltas, factors, out)
        case "trimmed-mean":
            return trimmed_mean(deltas, bad, factors, out)
    return weighted_mean(deltas, weights, steps, out, factors)


def median(deltas: Sequence[Vector], factors: Sequence[float] | None = None, out: Vector | None = None) -> Vector:
    """By element the middle one of c_i Δ_i, or the mean of the two middle ones; float32 of shape (numel,).

    factors: c_i; None: all are 1. out: where to put it. The deltas are finite.
    """
    return _middle(deltas, (len(deltas) - 1) // 2, factors, out)


def trimmed_mean(
    deltas: Sequence[Vector], cut: int, factors: Sequence[float] | None = None, out: Vector | None = None
) -> Vector:
    """By element the mean of c_i Δ_i without the `cut` smallest and the `cut` largest. Otherwise as `median`."""
    assert 2 * cut < len(deltas)
    return _middle(deltas, cut, factors, out)


def _middle(deltas: Sequence[Vector], cut: int, factors: Sequence[float] | None, out: Vector | None) -> Vector:
    """Sorted piece by piece, so that it takes no more memory than one more piece of each."""
    out = np.empty_like(deltas[0]) if out is None else out
    factors = [1.0] * len(deltas) if factors is None else factors
    network = _comparators(len(deltas))
    rows = [np.empty(min(PIECE, out.size), np.float32) for _ in deltas]
    spare = np.empty_like(rows[0])
    share = np.float32(1.0 / (len(deltas) - 2 * cut))
    for start in range(0, out.size, PIECE):
        target = out[start : start + PIECE]
        held = slice(0, target.size)
        for row, delta, factor in zip(rows, deltas, factors, strict=True):
            np.multiply(delta[start : start + PIECE], np.float32(factor), out=row[held])
        for low, high in network:
            np.minimum(rows[low][held], rows[high][held], out=spare[held])
            np.maximum(rows[low][held], rows[high][held], out=rows[high][held])
            rows[low], spare = spare, rows[low]
        np.multiply(rows[cut][held], share, out=target)
        for row in rows[cut + 1 : len(rows) - cut]:
            target += np.multiply(row[held], share, out=spare[held])
    return out


@functools.cache
def _comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Batcher's merge exchange (Knuth, 5.2.2, algorithm M): pairs of places to put in order, one pair after the other.

    Whole rows are compared at once, which is six times as fast as numpy's sort of eight short columns.
    """
    pairs = []
    top = 1 << max(count - 1, 0).bit_length() - 1 if count > 1 else 0
    step = top
    while step:
        last, offset, distance = top, 0, step
        while True:
            pairs += [(low, low + distance) for low in range(count - distance) if low & step == offset]
            if last == step:
                break
            distance, last, offset = last - step, last >> 1, step
        step >>= 1
    return tuple(pairs)


def clip_factors(norms: Sequence[float], limit: float) -> list[float]:
    """min(1, limit / ‖Δ_i‖): what each delta is multiplied by so that none is longer, but for rounding."""
    return [1.0 if norm <= limit else limit / norm for norm in norms]


def lower_median(norms: Sequence[float]) -> float:
    """The middle one, of two the smaller: never above an honest one's as long as n ≥ 2f + 1."""
    return sorted(norms)[(len(norms) - 1) // 2]


def krum(products: Matrix, bad: int, count: int) -> tuple[int, ...]:
    """Which `count` contributions Krum prefers, in their order: those with the smallest s(i), of equal ones the first.

    s(i) = Σ_j ‖Δ_i − Δ_j‖² over the n − f − 2 others j that are nearest to i.

    products: ⟨Δ_i, Δ_j⟩, of shape (n, n), in float64, as differences of squares lose digits. bad: f.
    """
    number = len(products)
    near = number - bad - 2
    assert near >= 1
    squares = np.diagonal(products)
    apart = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
    scores = [float(np.sort(np.delete(apart[place], place))[:near].sum()) for place in range(number)]
    return tuple(sorted(sorted(range(number), key=lambda place: (scores[place], place))[:count]))
