"""The measure of contributions before they are folded: their norms and inner products, and the verdict on them.

Done chunk by chunk as they come, on the fold's thread, of what the codec makes of them. No more is kept of an attempt
than the products of its contributions with each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parablock import robust
from parablock.aggregation import PIECE, unfit
from parablock.coordinator_events import Measured, Unfit
from parablock.layout import Layout
from parablock.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from parablock.config import Config
    from parablock.coordinator_events import Measure
    from parablock.manifest import Manifest
    from parablock.robust_settings import Robust

    Vector = npt.NDArray[np.float32]
    Matrix = npt.NDArray[np.float64]
    Squares = npt.NDArray[np.float64]


@dataclass
class _Attempt:
    """products: as of `products`, over the chunks so far.

    unfit: some of it must not be counted, so that nothing comes of it, whatever else has been asked for.
    """

    round: int
    number: int
    products: Matrix | Squares
    chunks: int = 0
    unfit: bool = False


class Measurement:
    """Answers `Measure` effects. Not thread-safe: the fold's thread owns it."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self._config = config
        # Where the broker hides each client in their sum, none is longer than the noise is made for.
        privacy, rule = config.privacy, config.robust
        self._rule = replace(rule, clip=privacy.clip) if privacy.central else rule
        self._numels = [block.numel for block in manifest.blocks]
        self._attempt: _Attempt | None = None

    def take(self, measure: Measure) -> Measured | Unfit | None:
        """The next chunk of every contribution; the verdict after a block's last one."""
        number = len(measure.contributions)
        attempt = self._attempt
        if attempt is None or (attempt.round, attempt.number) != (measure.round, measure.attempt):
            nothing = np.zeros((number, number) if self._rule.by_distance else number)
            attempt = self._attempt = _Attempt(measure.round, measure.attempt, nothing)
        if attempt.unfit:
            return None
        assert attempt.chunks == measure.index, "the chunks of an attempt are measured in order, each once"
        layout = Layout.up(self._config, self._numels[measure.block])
        part = layout.part(measure.index)
        names = [contribution.client for contribution in measure.contributions]
        deltas = [layout.codec.decode(each.payload, part.stop - part.start) for each in measure.contributions]
        found = zip(names, map(unfit, deltas), strict=True)
        reasons = {name: reason for name, reason in found if reason is not None}
        if reasons:
            attempt.unfit = True
            return Unfit(measure.round, measure.attempt, reasons)
        attempt.products += products(deltas, pairs=self._rule.by_distance)
        attempt.chunks += 1
        if attempt.chunks < layout.count:
            return None
        verdict = judge(self._rule, names, attempt.products, measure.bad)
        return Measured(measure.round, measure.attempt, verdict)


def products(deltas: Sequence[Vector], *, pairs: bool) -> Matrix | Squares:
    """⟨Δ_i, Δ_j⟩ in float64, of shape (n, n). deltas: float32, of shape (numel,). pairs: else only ‖Δ_i‖², of shape
    (n,), one delta after the other."""
    numel = deltas[0].size
    if not pairs:
        piece = np.empty(min(PIECE, numel))
        return np.array([sum(_square(delta, start, piece) for start in range(0, numel, PIECE)) for delta in deltas])
    total = np.zeros((len(deltas), len(deltas)))
    for start in range(0, numel, PIECE):
        rows = np.stack([delta[start : start + PIECE] for delta in deltas]).astype(np.float64)
        total += rows @ rows.T
    return total


def _square(delta: Vector, start: int, piece: npt.NDArray[np.float64]) -> float:
    """Of the part that begins there. piece: where to put it in float64."""
    part = delta[start : start + PIECE]
    held = piece[: part.size]
    held[:] = part
    return float(np.einsum("i,i->", held, held))  # on this thread; BLAS would wake others for each piece


def judge(settings: Robust, names: Sequence[str], products: Matrix | Squares, bad: int) -> Verdict:
    """Whom a rule counts, and how much of each delta. names: of the contributions. products: as of `products`. bad: how
    many of them may be.

    Contributions are cut first: distances are those of what is left.
    """
    norms = [math.sqrt(square) for square in (np.diagonal(products) if products.ndim == 2 else products)]
    limit = settings.clip or math.inf
    if settings.clip_ratio:
        limit = settings.clip_ratio * robust.lower_median(norms)
    factors = robust.clip_factors(norms, limit)
    if not settings.by_distance:
        return Verdict(dict(zip(names, factors, strict=True)))
    scales = np.array(factors)
    chosen = robust.krum(products * np.outer(scales, scales), bad, settings.count(len(names), bad))
    reason = f"{settings.rule} has chosen {len(chosen)} of {len(names)} contributions, which are nearer to the others"
    return Verdict(
        {names[place]: factors[place] for place in chosen},
        {name: reason for place, name in enumerate(names) if place not in chosen},
    )
