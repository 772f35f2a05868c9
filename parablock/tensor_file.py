"""A file of named flat vectors and some facts about them, that is read back as it was written or not at all.

A file is written beside the old one and takes its place when it is whole. It outlives the process that wrote it;
whether it outlives a power cut is up to the disk, unless that is waited for (`synced`). Format and checksums are
`parablock.checked_tensors`'.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parablock import checked_tensors, placement
from parablock.checked_tensors import DTYPES, Damage, checksum

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[Any]

_FACTS = "facts"
_NAMES = {dtype.newbyteorder("="): name for name, dtype in DTYPES.items()}


class TensorFileError(ValueError):
    """A file is damaged, or is no such file. The message names it and says what is wrong with it."""


@dataclass(frozen=True)
class Tensors:
    """What a file holds, its checksums verified. vectors: by name, flat, float32 or uint8. facts: as given."""

    vectors: Mapping[str, Vector]
    facts: Mapping[str, Any]


def write(
    path: Path, vectors: Mapping[str, Vector], facts: Mapping[str, Any], *, private: bool = False, synced: bool = False
) -> int:
    """Put the file in place of what `path` was; returns its bytes.

    vectors: flat, contiguous, float32 or uint8, which nobody changes meanwhile. facts: what JSON can say, without NaN.
    private: for the owner's eyes only. synced: it survives a power cut, or else only the death of this process.
    Raises OSError where the disk refuses; then the old file is still there.
    """
    views = {name: _view(values) for name, values in vectors.items()}
    tensors = {name: (_NAMES[values.dtype], values.size) for name, values in vectors.items()}
    checksums = {name: checksum(view) for name, view in views.items()}
    header = checked_tensors.header(tensors, checksums, {_FACTS: json.dumps(facts, allow_nan=False)})
    temporary = path.with_name(f".{path.name}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            for view in (memoryview(header), *views.values()):
                while view:
                    view = view[file.write(view) :]
            if synced:
                os.fsync(descriptor)
        if synced:
            placement.replace(temporary, path)
        else:
            os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # what counts is the first error
            temporary.unlink(missing_ok=True)
        raise
    return len(header) + sum(view.nbytes for view in views.values())


def read(path: Path) -> Tensors:
    """Everything in the file. Raises TensorFileError where it is damaged, FileNotFoundError where there is none, and
    any other OSError where the disk or the system refuses just now, which says nothing about the file."""
    with path.open("rb", buffering=0) as file:
        try:
            metadata, vectors = checked_tensors.read(file)
        except Damage as damage:
            raise TensorFileError(f"{path} {damage}") from damage
    if _FACTS not in metadata:
        raise TensorFileError(f"{path} was written for something else: it holds no facts")
    return Tensors(vectors, json.loads(metadata[_FACTS]))


class Reader:
    """A file that is kept open, and read part by part as the parts are needed. From any thread.

    Of its checksums only the header's is looked at: this is for what the same process has written, and no power cut
    can have torn since. It is there as long as this is, also where its name goes. Raises as `read` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb", buffering=0) as file:
            try:
                self._places = checked_tensors.places(file)
            except Damage as damage:
                raise TensorFileError(f"{path} {damage}") from damage
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def names(self) -> Collection[str]:
        """Of its vectors."""
        return self._places.keys()

    def numel(self, name: str) -> int:
        return self._places[name].numel

    def holds(self, name: str, values: Vector) -> bool:
        """Whether a vector is this one, by its checksum."""
        return name in self._places and self._places[name].checksum == checksum(_view(values))

    def read(self, name: str, start: int, stop: int) -> Vector:
        """Elements of a vector, in memory of their own. Raises TensorFileError where the file is shorter than it was,
        and OSError."""
        of = self._places[name]
        assert 0 <= start <= stop <= of.numel, f"elements {start} to {stop} of {of.numel}"
        values = np.empty(stop - start, of.dtype)
        place, view = of.begin + start * of.dtype.itemsize, values.data.cast("B") if values.size else memoryview(b"")
        while view:
            count = os.preadv(self._descriptor, [view], place)
            if not count:
                raise TensorFileError(f"{self.path} is torn: it ends at byte {place}, within its {name}")
            place, view = place + count, view[count:]
        return values.astype(of.dtype.newbyteorder("="), copy=False)


def _view(values: Vector) -> memoryview:
    assert values.dtype in _NAMES, f"vectors are float32 or uint8, got {values.dtype}"
    assert values.ndim == 1, f"vectors are flat, got the shape {values.shape}"
    assert values.flags.c_contiguous, "vectors are contiguous"
    if not values.size:
        return memoryview(b"")  # which cannot be cast
    return values.astype(values.dtype.newbyteorder("<"), copy=False).data.cast("B")
