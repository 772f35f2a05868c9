"""How far honest contributions lie apart, against what they have in common: what the theory of robust rules asks for.

    spread  s = √(Σ_i ‖Δ_i − Δ̄‖² / (n − 1))    of one contribution: √d σ in the theorems
    signal  g = √(‖Δ̄‖² − s² / n)               of what all tend to, without what Δ̄ itself has of the spread

Krum bears f of n where η(n, f) s < g, with η² = 2 (n − f + (f (n − f − 2) + f² (n − f − 1)) / (n − 2f − 2)): Blanchard
et al., NIPS 2017, proposition 1. Multi-Krum is asked for the same, as by Damaskinos et al., MLSys 2019; Bareilles et
al., arXiv 2602.03899, hold that its first proof is theirs, and that its bound is never worse than Krum's. What median
and trimmed mean are off by is of the order of (f / n + 1 / √n) s: Yin et al., arXiv 1803.01498, theorems 1 and 4, whose
constants, and what the shape of the tails adds, are left out here. 1 / √n of it the mean has as well, without any bad
client. Where what a rule is off by is longer than g, no theorem says that a step leads downhill.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]


def ratio(deltas: Sequence[Vector]) -> float:
    """s / g of honest contributions, at least two, each of shape (numel,); infinite where they have nothing in common.

    In float64, as differences of contributions lose digits.
    """
    rows = np.stack(deltas).astype(np.float64)
    mean = rows.mean(axis=0)
    apart = float(np.square(rows - mean).sum()) / (len(rows) - 1)
    common = float(np.square(mean).sum()) - apart / len(rows)
    return math.sqrt(apart / common) if common > 0.0 else math.inf


def asked(rule: str, clients: int, bad: int) -> float | None:
    """By how much s / g is multiplied in what the rule's theory wants to be below 1. None: there is no such theory.

    clients: n, enough of them for the rule. bad: f.
    """
    match rule:
        case "krum" | "multi-krum":
            return _krum(clients, bad)
        case "median" | "trimmed-mean":
            return bad / clients + 1.0 / math.sqrt(clients)
    return None


def _krum(n: int, f: int) -> float:
    return math.sqrt(2.0 * (n - f + (f * (n - f - 2) + f * f * (n - f - 1)) / (n - 2 * f - 2)))
