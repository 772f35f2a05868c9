"""What a round leaves behind until its block has landed: in memory until it is on disk, then read back part by part.

That is the delta, which goes up chunk by chunk and is learnt from piece by piece, and what the block was before.
Neither is needed all at once. Without a folder, or where the disk refuses, both stay in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from parablock.tensor_file import TensorFileError
from workers.state_folder import DiskError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from parablock.tensor_file import Reader
    from workers.outbox import Leaving

    Vector = npt.NDArray[np.float32]


class StoredVector:
    """One of the vectors in a file. From any thread."""

    def __init__(self, file: Reader, name: str) -> None:
        self._file, self._name = file, name

    @property
    def size(self) -> int:
        return self._file.numel(self._name)

    def __getitem__(self, part: slice) -> Vector:
        """Elements of it, in memory of their own. Raises DiskError."""
        start, stop, _ = part.indices(self.size)
        try:
            return cast("Vector", self._file.read(self._name, start, stop))
        except TensorFileError as error:
            raise DiskError(f"{error}, and was whole when this process wrote it") from error
        except OSError as error:
            raise DiskError(f"cannot read {self._file.path}: {error.strerror or error}; it is left as it is") from error


class Spillable:
    """A vector that may be on its way from the device, as `workers.outbox.Leaving` has it, and is read by slices too.
    From any thread."""

    def __init__(self, made: Leaving) -> None:
        self.numel = self.size = made.numel
        self._made: Leaving | None = made
        self._stored: StoredVector | None = None

    def wait(self) -> Vector:
        return self[:]

    def __getitem__(self, part: slice) -> Vector:
        """Elements of it, which nobody changes. Raises DiskError once it is stored."""
        made = self._made
        if made is not None:
            return made.wait()[part]
        assert self._stored is not None
        return self._stored[part]

    def spill(self, stored: StoredVector) -> None:
        """Let go of the memory: from now on it is read from there."""
        assert stored.size == self.size, f"{stored.size} elements stand for {self.size}"
        self._stored = stored
        self._made = None
