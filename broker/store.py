"""The store: new blocks on their way to disk, written part by part while the rest of them is still being folded.

Runs on the disk's one thread, beside the folds, so that a chunk need not wait for the disk before it leaves; only the
commit does. What the disk refuses on the way is written at the commit, which says so if it cannot.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from parablock.block_file import Label

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from parablock.block_file import BlockWriter
    from parablock.coordinator_events import Store
    from parablock.run_folder import RunFolder

    Vector = npt.NDArray[np.float32]

log = logging.getLogger("broker")


class BlockStore:
    """digest: of the manifest, which every file bears."""

    def __init__(self, folder: RunFolder, digest: str) -> None:
        self._folder = folder
        self._digest = digest
        self._attempt: tuple[int, int] | None = None  # round and number of the attempt that is being written
        self._writer: BlockWriter | None = None  # None: the disk has refused

    def write(self, round: int, attempt: int, block: int, numel: int, values: Vector) -> None:
        """The next part of the block of `numel` elements that an attempt makes, in place of any attempt before it."""
        try:
            if self._attempt != (round, attempt):
                self.close()
                self._attempt = round, attempt
                self._writer = self._folder.block_writer(self._label(block, round), numel)
            if self._writer is not None:
                self._writer.write(values)
        except OSError as error:  # nothing was announced yet; `commit` tries again
            log.warning("cannot write round %d's block yet: %s", round, error)
            self._give_up()

    def commit(self, store: Store, values: Vector) -> None:
        """Make the block durable, of which every part was written. values: the whole block, shape (numel,).

        Raises OSError where the disk refuses; then the version before is still there, and it may be tried again.
        """
        assert self._attempt == (store.round, store.attempt), "another attempt was written last"
        if self._writer is None:
            self._folder.save_block(self._label(store.block, store.round), values)
            return
        try:
            self._writer.commit()
            self._writer = None
        except OSError:
            self._give_up()
            raise

    def close(self) -> None:
        """Leave no half-written block behind."""
        if self._writer is not None:
            self._give_up()

    def _give_up(self) -> None:
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def _label(self, block: int, round: int) -> Label:
        return Label(block, round + 1, round, self._digest)
