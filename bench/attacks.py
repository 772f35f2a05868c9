"""What bad clients send instead of what they have trained: poisoned deltas, the same for the same seed.

flipped   each its own delta, the other way round and five times as long
random    each Gaussian noise, ten times as long as its own delta
equal     all the same: the mean of the honest ones' deltas, the other way round and five times as long (collusion)
nan       each its own delta with a NaN in it
hidden    all the same: the mean of the honest ones' deltas, the other way round, and no longer than an honest one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

ATTACKS = ("flipped", "random", "equal", "nan", "hidden")


@dataclass(frozen=True)
class Attack:
    """By the first `bad` of the clients, who know what all others send."""

    kind: str
    bad: int
    seed: int

    def __call__(self, round: int, deltas: Mapping[int, Vector]) -> dict[int, Vector]:
        """What is sent of a round's deltas, which are by client: float32, shape (numel,), left as they are."""
        honest = np.mean([delta for client, delta in deltas.items() if client >= self.bad], axis=0, dtype=np.float64)
        length = float(np.median([_norm(delta) for client, delta in deltas.items() if client >= self.bad]))
        sent = {}
        for client, delta in deltas.items():
            sent[client] = delta if client >= self.bad else self._forged(round, client, delta, honest, length)
        return sent

    def _forged(self, round: int, client: int, own: Vector, honest: npt.NDArray[np.float64], length: float) -> Vector:
        match self.kind:
            case "flipped":
                return np.float32(-5.0) * own
            case "random":
                noise = np.random.default_rng((self.seed, round, client)).standard_normal(own.size, np.float32)
                return np.float32(10.0 * _norm(own) / _norm(noise)) * noise
            case "equal":
                return (-5.0 * honest).astype(np.float32)
            case "nan":
                forged = own.copy()
                forged[own.size // 2] = np.nan
                return forged
            case "hidden":
                norm = float(np.linalg.norm(honest))
                return (honest * (-length / norm if norm else 0.0)).astype(np.float32)
        raise AssertionError(f"no such attack: {self.kind}")


def _norm(delta: Vector) -> float:
    return float(np.linalg.norm(delta.astype(np.float64)))
