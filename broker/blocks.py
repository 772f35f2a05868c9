"""The global model at the broker: one float32 vector per block, moved by folds.

Runs on the fold executor's one thread. A vector is never changed once it is here: a fold makes a new one, so that the
old one may still be on its way to a slow client while the new one is sent to the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.aggregation import ServerOptimizer, unfit, weighted_mean
from parablock.coordinator_events import Fold, Folded, Unfit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from parablock.config import Server
    from parablock.manifest import Manifest
    from parablock.run_folder import RunFolder

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BaseModel:
    """What the broker takes from the base model: its layout, its digests, and its blocks' values."""

    manifest: Manifest
    weights: str
    tokenizer: str
    values: list[Vector]  # by block


class GlobalBlocks:
    """x, by block, and the server optimizer's state."""

    def __init__(self, base: BaseModel, settings: Server, folder: RunFolder) -> None:
        self._digest = base.manifest.digest
        self._values = list(base.values)
        self._optimizer = ServerOptimizer(settings)
        self._folder = folder

    def fold(self, fold: Fold) -> Folded | Unfit:
        """Check the contributions and move the block by their mean."""
        reasons = {c.client: reason for c in fold.contributions if (reason := unfit(c)) is not None}
        if reasons:
            return Unfit(fold.round, reasons)
        x = self._values[fold.block]
        new = self._optimizer.step(fold.block, x, weighted_mean(fold.contributions, x.size))
        new.flags.writeable = False
        self._values[fold.block] = new
        return Folded(fold.round, new.data.cast("B"))

    def store(self, fold: Fold) -> None:
        """Write the block that `fold` made into the run's folder, durably. Raises OSError where the disk refuses."""
        self._folder.save_block(fold.block, fold.round + 1, self._values[fold.block], self._digest, round=fold.round)
