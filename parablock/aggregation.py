"""Aggregation: the weighted mean of contributions, and the server optimizer that moves the block by it.

Contributions are lists of pieces, the chunks as they came off the wire; they are folded from where they lie. The
order of the fold is the order of the list, which the coordinator keeps equal to the roster's, so that the result does
not depend on the order of arrival (floating-point addition is not associative).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parablock.config import Server
    from parablock.wire import Buffer

    Vector = npt.NDArray[np.float32]

PIECE = 1 << 16
"""Elements folded at a time: 256 KiB of float32 stay in the cache while every contribution passes over them."""


@dataclass(frozen=True)
class Contribution:
    """One client's delta: `pieces` are its float32 bytes in order, each a multiple of 4 bytes long."""

    client: str
    weight: int
    pieces: Sequence[Buffer]


def gather(pieces: Sequence[Buffer], numel: int) -> Vector:
    """The pieces as one float32 vector of `numel` elements (a copy). The length must fit: that is our own doing."""
    out = np.empty(numel, dtype=np.float32)
    position = 0
    for piece in pieces:
        values = np.frombuffer(piece, dtype=np.float32)
        out[position : position + values.size] = values
        position += values.size
    assert position == numel, f"{position} elements gathered, {numel} expected"
    return out


def unfit(contribution: Contribution) -> str | None:
    """Why a contribution must not be counted: it holds values that are not finite. None if it may."""
    for piece in contribution.pieces:
        if not np.isfinite(np.frombuffer(piece, dtype=np.float32)).all():
            return "the update holds values that are not finite (NaN or infinity)"
    return None


def weighted_mean(contributions: Sequence[Contribution], numel: int) -> Vector:
    """Δ̄ = Σ_i (w_i / Σ_j w_j) · Δ_i in float32, folded in the order given; shape (numel,).

    With one contribution the factor is exactly 1 and the mean is that contribution, bit for bit.
    """
    total = sum(contribution.weight for contribution in contributions)
    mean = np.zeros(numel, dtype=np.float32)
    for number, contribution in enumerate(contributions):
        share = np.float32(contribution.weight / total)
        position = 0
        for piece in contribution.pieces:
            values = np.frombuffer(piece, dtype=np.float32)
            for start in range(0, values.size, PIECE):
                part = values[start : start + PIECE]
                target = mean[position + start : position + start + part.size]
                if number == 0:
                    np.multiply(part, share, out=target)
                else:
                    target += part * share
            position += values.size
        assert position == numel, f"a contribution of {position} elements, {numel} expected"
    return mean


class ServerOptimizer:
    """x ← x + ServerOpt(Δ̄), per block (FedAvg, and FedAvgM after Hsu et al., arXiv 1909.06335).

    average:  x + lr · Δ̄
    momentum: m ← β m + Δ̄;  x + lr · m
    nesterov: m ← β m + Δ̄;  x + lr · (Δ̄ + β m)
    """

    def __init__(self, settings: Server) -> None:
        self._settings = settings
        self._momentum: dict[int, Vector] = {}

    def step(self, block: int, x: Vector, mean: Vector) -> Vector:
        """The new value of the block; `x` and `mean` are left as they are. All of shape (numel,), float32."""
        move = mean
        if self._settings.optimizer != "average":
            beta = np.float32(self._settings.momentum)
            buffer = self._momentum.get(block)
            buffer = mean.copy() if buffer is None else beta * buffer + mean
            self._momentum[block] = buffer
            move = buffer if self._settings.optimizer == "momentum" else mean + beta * buffer
        # A step size of 1 multiplies exactly, so plain averaging with one client is x + delta to the last bit.
        return x + np.float32(self._settings.lr) * move
