"""The versions of blocks in a folder: written beside each other, listed, read back, and dropped when superseded.

    blocks/0003-000018.safetensors     block 3 as round 17 has made it (`parablock.block_file`)
    blocks/0003-000000.safetensors     as it is in the base model
    blocks/.0003-000018.safetensors.partial     a version that is being written, or that a killed broker has left

A version is never written over by another content, and the newest intact one of a block is never dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parablock.block_file import (
    BLOCK,
    BlockFileError,
    BlockWriter,
    Label,
    StoredBlock,
    file_name,
    numbers,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]


class BlockVersions:
    """One process writes to `folder`; any number may read, also while it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, index: int, version: int) -> Path:
        return self.folder / file_name(index, version)

    def writer(self, label: Label, numel: int, names: Sequence[str] = (BLOCK,)) -> BlockWriter:
        """Begin a version of so many elements. names: see `BlockWriter`. Raises OSError where the disk refuses."""
        return BlockWriter(self.path(label.index, label.version), label, numel, names)

    def save(self, label: Label, tensors: Mapping[str, Vector], entry: str = "") -> None:
        """Write a version at once; on return it survives a power cut. Raises OSError where the disk refuses.

        tensors: flat float32 vectors of one length, `block` among them. entry: JSON of the journal's row.
        """
        values = tensors[BLOCK]
        assert values.dtype == np.float32, f"a block is kept in float32, got {values.dtype}"
        assert values.ndim == 1, f"a block is one flat vector, got the shape {values.shape}"
        writer = self.writer(label, values.size, tuple(tensors))
        try:
            writer.write(tensors)
            writer.commit(entry)
        except OSError:
            writer.abort()
            raise

    def listed(self) -> dict[int, list[int]]:
        """By block, the versions that there are files of, intact or not, the oldest first."""
        found: dict[int, list[int]] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if (said := numbers(path)) is not None:
                found.setdefault(said[0], []).append(said[1])
        return {index: sorted(found[index]) for index in sorted(found)}

    def read(self, index: int, version: int) -> StoredBlock:
        """Raises as `block_file.read` does."""
        return read(self.path(index, version))

    def newest(self) -> Iterator[StoredBlock]:
        """Every block by rising index as its newest version, one in memory at a time.

        Raises BlockFileError where that is damaged: an older one shall not pass for it; OSError where it is refused.
        """
        for index, versions in self.listed().items():
            try:
                yield self.read(index, versions[-1])
            except BlockFileError:
                latest = self.listed().get(index, versions)[-1]
                if latest == versions[-1]:
                    raise
                yield self.read(index, latest)  # a broker that is at work has dropped the other one

    def newest_intact(
        self, index: int, at_most: int, check: Callable[[Path, StoredBlock], None]
    ) -> tuple[StoredBlock | None, list[str]]:
        """The newest version that is intact, up to `at_most`, and what is wrong with those that are newer than it.

        check: raises BlockFileError for one that does not belong here. Raises OSError where the system refuses to read
        one: it may be intact.
        """
        wrong: list[str] = []
        for version in reversed(self.listed().get(index, [])):
            if version <= at_most:
                try:
                    stored = self.read(index, version)
                    check(self.path(index, version), stored)
                    return stored, wrong
                except BlockFileError as error:
                    wrong.append(str(error))
        return None, wrong

    def superseded(self, index: int, keep: int) -> list[Path]:
        """Files of a block's versions that are older than the `keep` newest, at least one."""
        assert keep >= 1
        return [self.path(index, version) for version in self.listed().get(index, [])[:-keep]]

    def drop(self, index: int, version: int) -> None:
        """Remove a version that is superseded, if it is there. Raises OSError where the disk refuses."""
        self.path(index, version).unlink(missing_ok=True)

    def partial(self) -> list[Path]:
        """What is being written, or was when a broker was killed."""
        return sorted(self.folder.glob(".*.partial")) if self.folder.is_dir() else []
