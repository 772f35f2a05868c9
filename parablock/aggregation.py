"""Aggregation: the weighted mean of contributions, and the server optimizer that moves the block by it.

Everything here is element by element, so that a block is folded chunk by chunk, each as soon as it has come from
everybody. The order of the fold is the order of the list, which the coordinator keeps equal to the roster's, so that
the result does not depend on the order of arrival (floating-point addition is not associative).
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
    """One chunk of a client's delta, encoded, as it came off the wire. weight: of the client in this round."""

    client: str
    weight: int
    payload: Buffer


def unfit(values: Vector) -> str | None:
    """Why a contribution with these values must not be counted: they are not all finite. None if it may."""
    for start in range(0, values.size, PIECE):
        if not np.isfinite(values[start : start + PIECE]).all():
            return "the update holds values that are not finite (NaN or infinity)"
    return None


def weighted_mean(deltas: Sequence[Vector], weights: Sequence[int], out: Vector | None = None) -> Vector:
    """Δ̄ = Σ_i (w_i / Σ_j w_j) · Δ_i in float32, folded in the order given; all of shape (numel,).

    out: where to put it. With one contribution the factor is exactly 1 and the mean is that contribution, bit for bit.
    """
    out = np.empty_like(deltas[0]) if out is None else out
    total = sum(weights)
    shares = [np.float32(weight / total) for weight in weights]
    scaled = np.empty(min(PIECE, out.size), dtype=np.float32)
    for start in range(0, out.size, PIECE):
        target = out[start : start + PIECE]
        for number, (delta, share) in enumerate(zip(deltas, shares, strict=True)):
            part = delta[start : start + PIECE]
            if number == 0:
                np.multiply(part, share, out=target)
            else:
                target += np.multiply(part, share, out=scaled[: part.size])
    return out


def server_move(settings: Server, mean: Vector, momentum: Vector | None) -> tuple[Vector, Vector | None]:
    """(what is added to the block, the new momentum); FedAvg, and FedAvgM after Hsu et al., arXiv 1909.06335.

    average:  lr · Δ̄
    momentum: m ← β m + Δ̄;  lr · m
    nesterov: m ← β m + Δ̄;  lr · (Δ̄ + β m)

    mean, momentum: float32 of shape (numel,), left as they are; what is added may be `mean` itself. momentum: None at a
    block's first visit.
    """
    beta = np.float32(settings.momentum)
    move, new = mean, None
    if settings.optimizer != "average":
        new = mean.copy() if momentum is None else beta * momentum + mean
        move = new if settings.optimizer == "momentum" else mean + beta * new
    return (move if settings.lr == 1.0 else np.float32(settings.lr) * move), new
