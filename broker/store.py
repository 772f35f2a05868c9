"""The store: what makes a round durable. New versions of blocks, and the journal's rows.

Runs on the disk's one thread, beside the folds. A version is written part by part while the rest of it is still being
folded, so that a chunk need not wait for the disk before it leaves; only the commit does. What the disk refuses on the
way is written at the commit, which says so if it cannot.

A commit is two steps: the version takes its name, with the server optimizer's state and the round's entry in the same
file; then the journal gets the row. A broker that is killed in between finds the version at its restart, and commits it
(`broker.opening`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from parablock.block_file import Label
from parablock.journal_rows import Row, entry_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from parablock.block_file import BlockWriter
    from parablock.block_versions import BlockVersions
    from parablock.coordinator_events import Store
    from parablock.journal import Journal

    Vector = npt.NDArray[np.float32]

log = logging.getLogger("broker")


class BlockStore:
    """run: its id; digest: the manifest's; every file bears both. keep: newest versions of a block that stay, ≥ 2."""

    def __init__(self, versions: BlockVersions, journal: Journal, run: str, digest: str, keep: int) -> None:
        self._versions = versions
        self._journal = journal
        self._run = run
        self._digest = digest
        self._keep = keep
        self._listed = versions.listed()
        self._attempt: tuple[int, int] | None = None  # round and number of the attempt that is being written
        self._writer: BlockWriter | None = None  # None: the disk has refused
        self._named = False  # the version has its name, and lacks only its row

    def write(self, round: int, attempt: int, block: int, numel: int, parts: Mapping[str, Vector]) -> None:
        """The next part of the block of `numel` elements that an attempt makes, in place of any attempt before it.

        parts: by name of the tensor in the block's file.
        """
        try:
            if self._attempt != (round, attempt):
                self.close()
                self._attempt, self._named = (round, attempt), False
                self._writer = self._versions.writer(self._label(block, round), numel, tuple(parts))
            if self._writer is not None:
                self._writer.write(parts)
        except OSError as error:  # nothing was announced yet; `commit` tries again
            log.warning("cannot write round %d's block yet: %s", round, error)
            self._give_up()

    def commit(self, store: Store, tensors: Mapping[str, Vector] | None) -> None:
        """Make a round durable: the version of which every part was written, if it made one, and its row.

        tensors: all of the version, each of shape (numel,); None where nobody was counted. Raises OSError where the
        disk refuses; then the round is not committed, and it may be tried again.
        """
        if tensors is not None:
            assert self._attempt == (store.round, store.attempt), "another attempt was written last"
            if not self._named:
                self._name(store, tensors)
        self._journal.append(Row(store.entry, None if tensors is None else store.round + 1))
        if tensors is not None:
            self._drop_superseded(store.block, store.round + 1)

    def close(self) -> None:
        """Leave no half-written version behind."""
        if self._writer is not None:
            self._give_up()

    def _name(self, store: Store, tensors: Mapping[str, Vector]) -> None:
        """The first half of `commit`: the version takes its name. Raises as that does."""
        entry = entry_json(store.entry)
        try:
            if self._writer is None:
                self._versions.save(self._label(store.block, store.round), tensors, entry)
            else:
                self._writer.commit(entry)
                self._writer = None
        except OSError:
            self._give_up()
            raise
        self._named = True

    def _drop_superseded(self, block: int, version: int) -> None:
        listed = self._listed.setdefault(block, [])
        listed.append(version)
        while len(listed) > self._keep:
            try:
                self._versions.drop(block, listed[0])
            except OSError as error:  # room, not the round, is what is at stake; `parablock gc` drops it as well
                log.warning("cannot drop version %d of block %d: %s", listed[0], block, error)
            listed.pop(0)

    def _give_up(self) -> None:
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def _label(self, block: int, round: int) -> Label:
        return Label(block, round + 1, self._digest, self._run)
