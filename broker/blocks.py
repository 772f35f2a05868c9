"""The global model at the broker: one float32 vector per block, moved by folds.

Runs on the fold's one thread. A vector is never changed once it is here: a fold makes a new one, chunk by chunk, so
that the old one may still be on its way to a slow client while the first chunks of the new one leave. What a fold has
made counts only when it is settled; until then it may be begun anew by another attempt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parablock import feedback, fixed_point, robust
from parablock.aggregation import PIECE, STATE, decayed, server_move, unfit
from parablock.block_file import BLOCK, RESIDUAL, SERVER
from parablock.coordinator_events import Fold, Folded, Store, Unfit
from parablock.layout import Layout
from parablock.noise import Noise, noised_mean
from parablock.secure_settings import most_tokens
from parablock.transfer import Encoded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from parablock.block_file import StoredBlock
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.unmasking import Unmasking

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BaseModel:
    """What the broker takes from the base model: its layout, its digests, and its blocks' values."""

    manifest: Manifest
    weights: str
    tokenizer: str
    values: list[Vector]  # by block; `GlobalBlocks` takes them over


@dataclass
class _Attempt:
    """A block in the making. state, residual: as they will be, where the settings have them.

    made: elements so far. squares: of x' − x, summed up over those, where the settings want them.
    """

    round: int
    number: int
    values: Vector
    state: dict[str, Vector]  # the server optimizer's, by name
    residual: Vector | None
    made: int = 0
    squares: float = 0.0

    @property
    def tensors(self) -> dict[str, Vector]:
        """As the block's file keeps them."""
        kept = {BLOCK: self.values} | {SERVER + name: vector for name, vector in self.state.items()}
        return kept if self.residual is None else kept | {RESIDUAL: self.residual}


@dataclass(frozen=True)
class Made:
    """What a fold has made: the answer to it, and what is to be kept of it, which nobody changes any more.

    parts: by name of the tensor in the block's file, the block among them, each as long as the chunk.
    """

    answer: Folded
    block: int
    numel: int  # of the whole block
    parts: Mapping[str, Vector]


class GlobalBlocks:
    """x, by block, the server optimizer's state, and what the way down's codec has lost so far.

    With a lossy codec x is what every client holds, bit for bit: x ← x + decode(encode(move + e)). The move, not x, is
    what is encoded, and e is what earlier encodings of the block's moves have lost.
    """

    def __init__(self, base: BaseModel, config: Config, noise: Noise | None = None) -> None:
        """noise: where that comes from which `privacy.where = "central"` adds, for tests."""
        self._config = config
        self._noise = noise or Noise()
        self._values = base.values  # taken over: what a fold replaces shall be nobody else's
        self._state: dict[int, dict[str, Vector]] = {}
        self._residuals: dict[int, Vector] = {}
        self._attempt: _Attempt | None = None

    def restore(self, stored: StoredBlock) -> None:
        """Go on with a block and the server's state of it as they were stored."""
        block = stored.label.index
        self._values[block] = stored.values
        self._state[block] = stored.state
        if stored.residual is not None:
            self._residuals[block] = stored.residual

    def fold(self, fold: Fold) -> Made | Unfit:
        """Check one chunk of every contribution, and move that part of the block by their mean."""
        x = self._values[fold.block]
        attempt = self._attempt
        if attempt is None or (attempt.round, attempt.number) != (fold.round, fold.attempt):
            attempt = self._begin(fold)
        up, down = Layout.up(self._config, x.size), Layout.down(self._config, x.size, fold.attempt)
        part = up.part(fold.index)
        numel = part.stop - part.start
        deltas: list[Vector] = []  # where they are masked nobody knows them
        if fold.unmasking is None:
            deltas = [up.codec.decode(contribution.payload, numel) for contribution in fold.contributions]
        if self._config.robust.by_element and any(map(unfit, deltas)):  # it would leave out what is not finite
            return Unfit(fold.round, fold.attempt, _reasons(fold, deltas))
        values = mean = attempt.values[part]
        before = {name: vector[part] for name, vector in self._state.get(fold.block, {}).items()}
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            if fold.unmasking is None:
                self._mean(fold, deltas, mean)
            else:
                unmasked_mean(self._config, fold, fold.unmasking, mean)
            move, state = server_move(self._config.server, mean, before)
            if not down.codec.lossless and unfit(move) is not None:  # as it is if any contribution is
                return Unfit(fold.round, fold.attempt, _reasons(fold, deltas))
            if down.codec.lossless:
                squares = self._squares(move)  # before it is overwritten, where it is the mean
                np.add(x[part], move, out=values)
                payload = down.codec.encode(values)
            else:
                residual = None
                if attempt.residual is not None:
                    residual, lost = attempt.residual[part], self._residuals.get(fold.block)
                    residual[...] = 0.0 if lost is None else lost[part]
                payload, said = feedback.encode(down.codec, move, residual)
                squares = self._squares(said)
                np.add(x[part], said, out=values)
            # Likewise. A second moment that has overflowed gives finite values: its block would stand still for ever.
            if any(unfit(made) is not None for made in (values, *state.values())):
                return Unfit(fold.round, fold.attempt, _reasons(fold, deltas))
        attempt.made += numel
        attempt.squares += squares
        for name, vector in state.items():
            attempt.state[name][part] = vector
        parts = {name: vector[part] for name, vector in attempt.tensors.items()}
        moved = math.sqrt(attempt.squares / x.size) if attempt.made == x.size else 0.0
        return Made(Folded(fold.round, fold.attempt, Encoded.checked(payload), moved), fold.block, x.size, parts)

    def tensors(self, store: Store) -> dict[str, Vector]:
        """What the attempt has made, as the block's file keeps it: the whole block and the server's state of it.

        By name, each of shape (numel,), and nobody changes them any more.
        """
        tensors = self._complete(store).tensors
        for vector in tensors.values():
            vector.flags.writeable = False
        return tensors

    def settle(self, store: Store) -> None:
        """What the attempt has made counts from now on."""
        tensors, attempt = self.tensors(store), self._complete(store)
        self._values[store.block] = tensors[BLOCK]
        self._state[store.block] = attempt.state
        if attempt.residual is not None:
            self._residuals[store.block] = attempt.residual
        self._attempt = None

    def _mean(self, fold: Fold, deltas: list[Vector], out: Vector) -> None:
        """What stands for the deltas, by the settings' rule. Which of them count is settled, and how much of each."""
        policy, privacy = self._config.round, self._config.privacy
        factors = [each.factor for each in fold.contributions]
        if privacy.central:
            noised_mean(deltas, factors, self._config.sampled(policy.clients), privacy, self._noise, out)
            return
        weights = [decayed(each.weight, policy.late_decay, each.missed) for each in fold.contributions]
        steps = [each.steps for each in fold.contributions] if policy.weights == "normalised" else None
        robust.aggregate(self._config.robust.rule, fold.bad, deltas, weights, steps, factors, out)

    def _squares(self, moved: Vector) -> float:
        """Σ v², piece by piece, so that in float32 it does not lose much; 0 where the settings have no use for it."""
        if self._config.schedule.order != "importance":
            return 0.0
        pieces = (moved[start : start + PIECE] for start in range(0, moved.size, PIECE))
        return sum(float(np.dot(piece, piece)) for piece in pieces)

    def _complete(self, store: Store) -> _Attempt:
        attempt = self._attempt
        assert attempt is not None
        assert (attempt.round, attempt.number) == (store.round, store.attempt), "another attempt was folded last"
        return attempt

    def _begin(self, fold: Fold) -> _Attempt:
        x = self._values[fold.block]
        state = {name: np.empty_like(x) for name in STATE[self._config.server.optimizer]}
        residual = None
        if self._config.codec.error_feedback and not Layout.down(self._config, x.size, fold.attempt).codec.lossless:
            residual = np.empty_like(x)
        self._attempt = _Attempt(fold.round, fold.attempt, np.empty_like(x), state, residual)
        return self._attempt


def unmasked_mean(config: Config, fold: Fold, unmasking: Unmasking, out: Vector) -> None:
    """Δ̄ = Σ n_i Δ_i / Σ n_i of a chunk, from what is masked and adds up to Σ n_i Δ_i / n_max in fixed point."""
    total = unmasking.total([contribution.payload for contribution in fold.contributions], fold.index)
    tokens = sum(contribution.weight for contribution in fold.contributions)
    fixed_point.decode(total, most_tokens(config) / tokens, unmasking.bits, out)


def _reasons(fold: Fold, deltas: list[Vector]) -> dict[str, str]:
    """Who must not be counted, and why. Where all are finite and their mean is not, it is nobody's fault but all's."""
    checked = zip(fold.contributions, map(unfit, deltas), strict=bool(deltas))
    reasons = {contribution.client: reason for contribution, reason in checked if reason is not None}
    too_large = "the update holds values so large that a mean of them is not finite"
    return reasons or {contribution.client: too_large for contribution in fold.contributions}
