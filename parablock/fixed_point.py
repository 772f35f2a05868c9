"""Fixed point: float32 values as whole numbers modulo 2³², which add up exactly, in any order, masked or not.

    encode  q = round(x · factor · 2^f) mod 2³²        decode  x̄ = q · factor / 2^f,   q read as −2³¹ … 2³¹ − 1

f is the largest for which no sum of n values of at most `largest` leaves that range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]
    Words = npt.NDArray[np.uint32]

_PIECE = 1 << 16


def exponent(clients: int, largest: float) -> int:
    """f for sums of so many clients' values of at most `largest`: n · (largest · 2^f + 1) < 2³¹. May be negative."""
    bits = 62
    while clients * (largest * 2.0**bits + 1) >= 2**31:
        bits -= 1
    return bits


def beyond(values: Vector, largest: float) -> str | None:
    """Why these values cannot be encoded; None if they can. The broker is told, so that it says no value."""
    for start in range(0, values.size, _PIECE):
        most = float(np.max(np.abs(values[start : start + _PIECE])))
        if not most <= largest:
            found = f"a value beyond secure.range = {largest:g}" if np.isfinite(most) else "values that are not finite"
            return f"the update holds {found}"
    return None


def encode(values: Vector, factor: float, bits: int) -> Words:
    """values: float32 of shape (numel,), within the range that gave `bits`; factor: 0 to 1. uint32, of their shape."""
    words = np.empty(values.size, np.uint32)
    scale = factor * 2.0**bits
    for start in range(0, values.size, _PIECE):
        scaled = values[start : start + _PIECE].astype(np.float64)
        scaled *= scale
        words[start : start + _PIECE].view(np.int32)[...] = np.rint(scaled, out=scaled)
    return words


def decode(words: Words, factor: float, bits: int, out: Vector) -> None:
    """The inverse of `encode`, of a sum, into `out`: float32 of the shape of `words`, each rounded once."""
    scale = factor * 2.0**-bits
    for start in range(0, words.size, _PIECE):
        out[start : start + _PIECE] = words[start : start + _PIECE].view(np.int32).astype(np.float64) * scale
