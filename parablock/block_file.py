"""A block on disk: one safetensors file that holds its flat float32 vector, with a checksum in the metadata.

The format is safetensors' own (https://github.com/huggingface/safetensors#format), so that any tool reads it; it is
written here, because a block is written while it is being made, part by part, and its checksum is known only at the
end: XXH3-128, against torn and flipped bits, not against forgery. A new version is written beside the old one and
takes its place when it is whole and on disk; a reader finds the one or the other and never half of either.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

TENSOR = "block"  # the only tensor in the file
_CHECKSUM = "xxh3_128"


class BlockFileError(ValueError):
    """A block's file cannot be read. The message names it and says what to do."""


@dataclass(frozen=True)
class Label:
    """What a file says of its block. round: the one that made this version, −1 where none did.

    manifest: `Manifest.digest` of the model that it belongs to.
    """

    index: int
    version: int
    round: int
    manifest: str


@dataclass(frozen=True)
class StoredBlock:
    """A block as its file holds it, with its checksum verified. values: float32, shape (numel,)."""

    label: Label
    values: Vector


class BlockWriter:
    """A version of a block on its way to disk. Everything raises OSError where the disk refuses."""

    def __init__(self, path: Path, label: Label, numel: int) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.partial")
        self._label = label
        self._numel = numel
        self._checksum = xxhash.xxh3_128()
        self._file = self._temporary.open("wb", buffering=0)
        try:
            self._write(_header(label, numel, "0" * 32))
        except OSError:
            self.abort()
            raise

    def write(self, values: Vector) -> None:
        """The block's next elements."""
        data = values.astype("<f4", copy=False).data.cast("B")
        self._checksum.update(data)
        self._write(data)

    def commit(self) -> None:
        """Every element was written: make the file durable, and put it in the old one's place."""
        header = _header(self._label, self._numel, self._checksum.hexdigest())
        assert self._file.tell() == len(header) + 4 * self._numel, "the block is not written whole"
        self._file.seek(0)
        self._write(header)
        os.fsync(self._file.fileno())
        self._file.close()
        replace(self._temporary, self._path)

    def abort(self) -> None:
        """This version shall not be. The old one stays."""
        with contextlib.suppress(OSError):  # of a disk that is full; what counts is that the file goes
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def read(path: Path) -> StoredBlock:
    """The block in `path`, whose name is its index. Raises BlockFileError."""
    advice = "restore it from a backup of the run"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            values: Vector = file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise BlockFileError(f"{path} cannot be read as a block: {error}; {advice}") from error
    try:
        index, version, round = (int(metadata[key]) for key in ("index", "version", "round"))
        label, expected = Label(index, version, round, metadata["manifest"]), metadata[_CHECKSUM]
    except (KeyError, ValueError) as error:
        raise BlockFileError(f"{path} was not written by parablock (metadata: {error!r})") from error
    if index != int(path.stem):
        raise BlockFileError(f"{path} holds block {index}; was it renamed? {advice.capitalize()}")
    if values.dtype != np.float32 or values.ndim != 1:
        raise BlockFileError(f"{path} holds {values.dtype} of shape {values.shape}, not a flat float32 vector")
    found = xxhash.xxh3_128_hexdigest(values.astype("<f4", copy=False).data.cast("B"))
    if found != expected:
        raise BlockFileError(
            f"{path} is damaged: {_CHECKSUM} of its data is {found[:16]}…, written was {expected[:16]}…; {advice}"
        )
    return StoredBlock(label, values)


def replace(temporary: Path, path: Path) -> None:
    """Put a file that is already on disk in its place, and the folder's entry on disk as well."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _header(label: Label, numel: int, checksum: str) -> bytes:
    metadata = {
        "index": str(label.index),
        "version": str(label.version),
        "round": str(label.round),
        "manifest": label.manifest,
        _CHECKSUM: checksum,
    }
    tensor: dict[str, Any] = {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}
    text = json.dumps({"__metadata__": metadata, TENSOR: tensor}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned, and so can be mapped
    return struct.pack("<Q", len(text)) + text
