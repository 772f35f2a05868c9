"""The store: new blocks on their way to disk, written part by part while the rest of them is still being folded.

Runs on the disk's one thread, beside the folds, so that a chunk need not wait for the disk before it leaves; only the
commit does. What the disk refuses on the way is written at the commit, which says so if it cannot.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from parablock.block_file import Label

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from parablock.block_file import BlockWriter
    from parablock.block_versions import BlockVersions
    from parablock.coordinator_events import Store

    Vector = npt.NDArray[np.float32]

log = logging.getLogger("broker")


class BlockStore:
    """digest: of the manifest, which every file bears."""

    def __init__(self, versions: BlockVersions, digest: str) -> None:
        self._versions = versions
        self._digest = digest
        self._attempt: tuple[int, int] | None = None  # round and number of the attempt that is being written
        self._writer: BlockWriter | None = None  # None: the disk has refused

    def write(self, round: int, attempt: int, block: int, numel: int, parts: Mapping[str, Vector]) -> None:
        """The next part of the block of `numel` elements that an attempt makes, in place of any attempt before it.

        parts: by name of the tensor in the block's file.
        """
        try:
            if self._attempt != (round, attempt):
                self.close()
                self._attempt = round, attempt
                self._writer = self._versions.writer(self._label(block, round), numel, tuple(parts))
            if self._writer is not None:
                self._writer.write(parts)
        except OSError as error:  # nothing was announced yet; `commit` tries again
            log.warning("cannot write round %d's block yet: %s", round, error)
            self._give_up()

    def commit(self, store: Store, tensors: Mapping[str, Vector]) -> None:
        """Make the version durable, of which every part was written. tensors: all of it, each of shape (numel,).

        Raises OSError where the disk refuses; then there is no such version, and it may be tried again.
        """
        assert self._attempt == (store.round, store.attempt), "another attempt was written last"
        if self._writer is None:
            self._versions.save(self._label(store.block, store.round), tensors)
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
        return Label(block, round + 1, self._digest)
