"""A version of a block on disk: one safetensors file with all that belongs to it, every bit of it under a checksum.

    block        the flat float32 vector, shape (numel,)
    server.NAME  the server optimizer's vectors of the block, by the names in `parablock.aggregation.STATE`
    residual     what the way down's codec has lost of the block so far
    entry        the journal's row of the round that made the version, as UTF-8 JSON

So a version and its state are there together or not at all, and the files alone can tell what the journal told. Of
these only `block` is in every file.

A block is written while it is being made, part by part, beside its place, and put there when it is whole and on disk;
a reader finds all of it or nothing. Format and checksums are `parablock.checked_tensors`'.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from parablock import checked_tensors
from parablock.checked_tensors import UNKNOWN, Damage, checksum
from parablock.placement import replace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

BLOCK, SERVER, RESIDUAL, ENTRY = "block", "server.", "residual", "entry"
"""Names of tensors; SERVER is what those of the server optimizer begin with."""

_LONGEST_ENTRY = 10**9
_NAME = re.compile(r"(\d{4,})-(\d{6,})\.safetensors")
_ADVICE = "`parablock verify` shows which versions are intact, and a resumed broker goes back to the newest of them"


class BlockFileError(ValueError):
    """A block's file cannot be read. The message names it and says what to do."""


@dataclass(frozen=True)
class Label:
    """What a file says of its block. version: the round that made it, plus one; 0: as in the base model, of no round.

    manifest: `Manifest.digest` of the model that it belongs to. run: the id of the run; "": it says of none.
    """

    index: int
    version: int
    manifest: str
    run: str = ""

    @property
    def round(self) -> int:
        """The one that made this version; −1: none did."""
        return self.version - 1


@dataclass(frozen=True)
class StoredBlock:
    """A version as its file holds it, with every checksum verified.

    tensors: by name, without the entry, each float32 of shape (numel,). entry: JSON; "": there is none.
    """

    label: Label
    tensors: Mapping[str, Vector]
    entry: str

    @property
    def values(self) -> Vector:
        """The block itself, shape (numel,)."""
        return self.tensors[BLOCK]

    @property
    def state(self) -> dict[str, Vector]:
        """The server optimizer's vectors, by its own names for them."""
        return {name.removeprefix(SERVER): each for name, each in self.tensors.items() if name.startswith(SERVER)}

    @property
    def residual(self) -> Vector | None:
        return self.tensors.get(RESIDUAL)


def file_name(index: int, version: int) -> str:
    """As 0003-000018.safetensors: block 3, version 18, which round 17 has made."""
    return f"{index:04d}-{version:06d}.safetensors"


def numbers(path: Path) -> tuple[int, int] | None:
    """Index and version that a file's name says; None: it is not the name of a version."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match is not None else None


def partial_name(path: Path) -> Path:
    """Where a version lies while it is being written."""
    return path.with_name(f".{path.name}.partial")


class BlockWriter:
    """A version of a block on its way to disk. Everything raises OSError where the disk refuses.

    names: of the tensors that come, `block` among them.
    """

    def __init__(self, path: Path, label: Label, numel: int, names: Sequence[str] = (BLOCK,)) -> None:
        assert BLOCK in names, f"a version without its block: {names}"
        self._path = path
        self._label = label
        self._numel = numel
        self._written = 0  # elements of each tensor
        self._checksums = {name: xxhash.xxh3_128() for name in names}
        # The header's length must be known before what stands in it: with the longest entry there is no longer one.
        self._header_bytes = len(_header(label, numel, dict.fromkeys([*names, ENTRY], UNKNOWN), _LONGEST_ENTRY))
        self._temporary = partial_name(path)
        self._file = self._temporary.open("wb", buffering=0)

    def write(self, parts: Mapping[str, Vector]) -> None:
        """The next elements of every tensor, as many of each."""
        assert parts.keys() == self._checksums.keys(), f"parts of {list(parts)}, of {list(self._checksums)}"
        for place, (name, so_far) in enumerate(self._checksums.items()):
            data = np.ascontiguousarray(parts[name]).astype("<f4", copy=False).data.cast("B")
            assert len(data) == 4 * parts[BLOCK].size
            so_far.update(data)
            self._write_at(self._header_bytes + 4 * (place * self._numel + self._written), data)
        self._written += parts[BLOCK].size

    def commit(self, entry: str = "") -> None:
        """Every element was written: make the file durable, and put it in its place. entry: the journal's row, JSON."""
        assert self._written == self._numel, "the block is not written whole"
        data, checksums = entry.encode(), {name: each.hexdigest() for name, each in self._checksums.items()}
        assert len(data) < _LONGEST_ENTRY
        if data:
            self._write_at(self._header_bytes + 4 * self._numel * len(checksums), data)
            checksums[ENTRY] = checksum(data)
        self._write_at(0, _header(self._label, self._numel, checksums, len(data), self._header_bytes))
        os.fsync(self._file.fileno())
        self._file.close()
        replace(self._temporary, self._path)

    def abort(self) -> None:
        """This version shall not be."""
        with contextlib.suppress(OSError):  # of a disk that is full; what counts is that the file goes
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_at(self, place: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._file.seek(place)
        while view:
            view = view[self._file.write(view) :]


def read(path: Path) -> StoredBlock:
    """The version in `path`, whose name says its index and its number.

    Raises BlockFileError where it is not there or not intact, OSError where the system refuses to read it: such a file
    may be intact, and nothing may be given up for it.
    """
    said = numbers(path)
    if said is None:
        raise BlockFileError(f"{path} is not named as a version of a block, like {file_name(3, 18)}")
    try:
        with path.open("rb") as file:
            stored = _read(path, file)
    except FileNotFoundError as error:
        raise BlockFileError(f"{path} is not there; {_ADVICE}") from error
    except OSError as error:
        lasts = "where that lasts, move the file away, and it counts as lost"
        raise OSError(error.errno, f"{error.strerror or error} while {path} was read; {lasts}") from error
    if (stored.label.index, stored.label.version) != said:
        raise BlockFileError(
            f"{path} holds block {stored.label.index}, version {stored.label.version}; was it renamed? "
            f"Give it back the name {file_name(stored.label.index, stored.label.version)}"
        )
    return stored


def _read(path: Path, file: BinaryIO) -> StoredBlock:
    try:
        metadata, tensors = checked_tensors.read(file)
    except Damage as damage:
        raise BlockFileError(f"{path} {damage}; {_ADVICE}") from damage
    if "index" not in metadata:
        raise BlockFileError(f"{path} is no version of a block; {_ADVICE}")
    entry = tensors.pop(ENTRY, np.empty(0, np.uint8)).tobytes()
    label = Label(int(metadata["index"]), int(metadata["version"]), metadata["manifest"], metadata.get("run", ""))
    return StoredBlock(label, tensors, entry.decode())


def _header(label: Label, numel: int, checksums: Mapping[str, str], entry_bytes: int, size: int = 0) -> bytes:
    """checksums: by name of the tensors, in their order in the file. size: bytes that it shall have, at least."""
    metadata = {"index": str(label.index), "version": str(label.version), "manifest": label.manifest, "run": label.run}
    tensors = {name: ("U8", entry_bytes) if name == ENTRY else ("F32", numel) for name in checksums}
    return checked_tensors.header(tensors, checksums, metadata, size)
