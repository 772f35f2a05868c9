"""Noise: what is added to deltas so that they tell little of a client, and the norm to which they are cut before.

Drawn from Philox (Salmon et al., SC 2011) with a key from the operating system: of the run's seed, which everybody
knows, nothing depends on it, and no two draws are ever the same. It is a statistical generator, not a cipher. Values
are float32, so that what is told of a real-valued Gaussian is not exactly true of them: attacks on the lowest bits of
floating-point noise (Mironov, CCS 2012) are not covered.
"""

from __future__ import annotations

import math
import os
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from parablock.aggregation import PIECE, unfit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parablock.privacy_settings import Privacy

    Vector = npt.NDArray[np.float32]


class Noise:
    """A source of Gaussian noise. key: of 128 bits, for tests only; None: from the operating system."""

    def __init__(self, key: int | None = None) -> None:
        self._key = int.from_bytes(os.urandom(16), "little") if key is None else key

    @cached_property
    def _generator(self) -> np.random.Generator:
        """Made when it is needed: numpy's generators are 2 MB of libraries, in processes that mostly add no noise."""
        return np.random.Generator(np.random.Philox(key=self._key))

    def add(self, values: Vector | npt.NDArray[np.float64], deviation: float) -> None:
        """Add to each of `values`, in place, a draw of its own with mean 0 and this standard deviation.

        Drawn and added in float64, and rounded once if they are float32. A deviation beyond that gives infinities.
        """
        for start in range(0, values.size, PIECE):
            piece = values[start : start + PIECE]
            drawn = self._generator.standard_normal(piece.size)
            drawn *= deviation
            drawn += piece
            piece[...] = drawn


def norm(values: Vector) -> float:
    """‖v‖ of a finite vector, summed up in float64."""
    pieces = (values[start : start + PIECE].astype(np.float64) for start in range(0, values.size, PIECE))
    return math.sqrt(sum(float(np.dot(piece, piece)) for piece in pieces))


def noised_mean(
    deltas: Sequence[Vector],
    factors: Sequence[float],
    clients: int,
    privacy: Privacy,
    noise: Noise,
    out: Vector,
) -> None:
    """(Σ_i c_i Δ_i + N(0, (z S)²)) / m into `out`, float32, all of shape (numel,).

    factors: c_i = min(1, S / ‖Δ_i‖) of the whole block. clients: m, how many a round is meant to have. However many
    have come, one of them more or less changes the sum by S at most, as nothing is divided by their number. It is
    added up in float64: what is lost of hundreds in float32 may be beyond `privacy_settings.ROUNDING`.
    """
    for start in range(0, out.size, PIECE):
        part = slice(start, start + PIECE)
        total = np.zeros(out[part].size)
        for delta, factor in zip(deltas, factors, strict=True):
            total += delta[part].astype(np.float64) * factor
        noise.add(total, privacy.deviation)
        out[part] = total / clients


def private(delta: Vector, privacy: Privacy, noise: Noise) -> Vector:
    """min(1, S / ‖Δ‖) · Δ + N(0, (z S)²), as it may leave a client; a vector of its own.

    Of a delta that is not finite the noise alone: whether it is must not be told either.
    """
    if unfit(delta) is not None:
        made = np.zeros_like(delta)
    else:
        length = norm(delta)
        made = delta * np.float32(min(1.0, privacy.clip / length) if length else 1.0)
    noise.add(made, privacy.deviation)
    return made
