"""Aggregation: the weighted mean of contributions, and the server optimizer that moves the block by it.

Everything here is element by element, so that a block is folded chunk by chunk, each as soon as it has come from
everybody. The order of the fold is the order of the list, which the coordinator keeps equal to the roster's, so that
the result does not depend on the order of arrival (floating-point addition is not associative).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from parablock.sections import Server
    from parablock.wire import Buffer

    Vector = npt.NDArray[np.float32]

PIECE = 1 << 16
"""Elements folded at a time: 256 KiB of float32 stay in the cache while every contribution passes over them."""

STATE: Mapping[str, tuple[str, ...]] = {
    "average": (),
    "momentum": ("momentum",),
    "nesterov": ("momentum",),
    "adam": ("first", "second"),
    "yogi": ("first", "second"),
}
"""By server optimizer, the vectors that it keeps of a block from one round of it to the next."""


@dataclass(frozen=True)
class Contribution:
    """One chunk of a client's delta, encoded, as it came off the wire. weight: tokens, in so many steps.

    missed: rounds of the block that were closed without it; where there are any, client is its CLIENT@ROUND. factor:
    what the delta is multiplied by, as the verdict on it says (`parablock.verdict`).
    """

    client: str
    weight: int
    steps: int
    payload: Buffer
    missed: int = 0
    factor: float = 1.0


def unfit(values: Vector) -> str | None:
    """Why a contribution with these values must not be counted: they are not all finite. None if it may."""
    for start in range(0, values.size, PIECE):
        if not np.isfinite(values[start : start + PIECE]).all():
            return "the update holds values that are not finite (NaN or infinity)"
    return None


def decayed(weight: int, decay: float, missed: int) -> int | Fraction:
    """n · d^m, exactly: what tokens count for that come m rounds of their block late. decay: d, in (0, 1]."""
    return weight * Fraction(decay) ** missed if missed else weight


def shares(weights: Sequence[int | Fraction], steps: Sequence[int] | None) -> list[float]:
    """What each delta is multiplied by in the mean. weights: tokens n_i of each client; steps: τ_i, which it took.

    without steps:  n_i / Σ_j n_j
    with steps:     τ_eff · p_i / τ_i   where   p_i = n_i / Σ_j n_j   and   τ_eff = Σ_j p_j τ_j

    A client that takes more steps has a longer delta and more tokens, so that by tokens it drags the mean twice. With
    steps it has more weight for its tokens only: the mean is τ_eff times that of the deltas per step, weighted by
    tokens (FedNova, Wang et al., arXiv 2007.07481, with tokens trained on as the size of a client's data). Between
    clients with as many tokens a step, deltas then count alike, whatever their lengths. With equal steps the two are
    the same to the last bit, and a single share is exactly 1, since each is rounded once.

    A late delta has its n_i decayed (`decayed`), so that its p_i is, while its τ_i stays what it was: it counts less in
    the mean per step and in τ_eff alike.
    """
    total = sum(weights)
    if steps is None or len(set(steps)) == 1:
        return [float(weight / total) for weight in weights]
    scale = Fraction(sum(weight * taken for weight, taken in zip(weights, steps, strict=True))) / total**2
    return [float(scale * weight / taken) for weight, taken in zip(weights, steps, strict=True)]


def weighted_mean(
    deltas: Sequence[Vector],
    weights: Sequence[int | Fraction],
    steps: Sequence[int] | None = None,
    out: Vector | None = None,
    factors: Sequence[float] | None = None,
) -> Vector:
    """Δ̄ = Σ_i s_i · c_i · Δ_i in float32, folded in the order given; all of shape (numel,). weights, steps: as in
    `shares`. factors: c_i; None: all are 1.

    out: where to put it. With one contribution its share is exactly 1 and the mean is that contribution, bit for bit.
    """
    out = np.empty_like(deltas[0]) if out is None else out
    factors = [1.0] * len(deltas) if factors is None else factors
    scales = [np.float32(share * c) for share, c in zip(shares(weights, steps), factors, strict=True)]
    scaled = np.empty(min(PIECE, out.size), dtype=np.float32)
    for start in range(0, out.size, PIECE):
        target = out[start : start + PIECE]
        for number, (delta, factor) in enumerate(zip(deltas, scales, strict=True)):
            part = delta[start : start + PIECE]
            if number == 0:
                np.multiply(part, factor, out=target)
            else:
                target += np.multiply(part, factor, out=scaled[: part.size])
    return out


def server_move(settings: Server, mean: Vector, state: Mapping[str, Vector]) -> tuple[Vector, dict[str, Vector]]:
    """(what is added to the block, the new state), by element.

    average:   lr · Δ̄
    momentum:  m ← β m + Δ̄;  lr · m
    nesterov:  m ← β m + Δ̄;  lr · (Δ̄ + β m)
    adam:      m ← β₁ m + (1 − β₁) Δ̄;  v ← β₂ v + (1 − β₂) Δ̄²;  lr · m / (√v + τ)
    yogi:      the same, but  v ← v − (1 − β₂) Δ̄² sign(v − Δ̄²)

    The first three are FedAvg and FedAvgM (Hsu et al., arXiv 1909.06335), the others FedAdam and FedYogi (Reddi et al.,
    arXiv 2003.00295, algorithm 2), as printed there: m begins at 0 and v at τ², and neither is corrected for that, so
    that no count of a block's rounds is needed and a block's first moves are small ones.

    mean, state: float32 of shape (numel,), left as they are; what is added may be `mean` itself. state: empty at a
    block's first round, later what the last one returned: vectors of their own, named as in `STATE`.
    """
    lr = np.float32(settings.lr)
    if settings.optimizer in ("adam", "yogi"):
        first, second = _moments(settings, mean, state)
        denominator: Vector = np.sqrt(second)
        denominator += np.float32(settings.tau)
        return lr * first / denominator, {"first": first, "second": second}
    move: Vector = mean
    new: dict[str, Vector] = {}
    if settings.optimizer != "average":
        beta = np.float32(settings.momentum)
        momentum = beta * state["momentum"] + mean if state else mean.copy()
        move = momentum if settings.optimizer == "momentum" else mean + beta * momentum
        new = {"momentum": momentum}
    return (move if settings.lr == 1.0 else lr * move), new


def _moments(settings: Server, mean: Vector, state: Mapping[str, Vector]) -> tuple[Vector, Vector]:
    """m and v after this round."""
    beta1, rest1 = np.float32(settings.beta1), np.float32(1.0 - settings.beta1)
    beta2, rest2 = np.float32(settings.beta2), np.float32(1.0 - settings.beta2)
    first = rest1 * mean
    if state:
        first += beta1 * state["first"]
    before = state["second"] if state else np.float32(settings.tau**2)
    square = mean * mean
    if settings.optimizer == "adam":
        return first, beta2 * before + rest2 * square
    return first, before - rest2 * square * np.sign(before - square)
