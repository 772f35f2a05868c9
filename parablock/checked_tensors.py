"""Safetensors with checksums: the header of our files, and reading one back as it was written or not at all.

The format is safetensors' own (https://github.com/huggingface/safetensors#format), so that any tool reads it. It is
written by ourselves because a block goes to its file while it is being made, part by part, so that its checksum is
known only at the end, and because vectors come back into memory of their own, without a copy of the whole file beside
them. The metadata has an XXH3-128 of every tensor and of the header itself: against torn and flipped bits, not against
forgery. What is done with a file, and where it lies, is `block_file`'s and `tensor_file`'s business.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Vector = npt.NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
"""Of tensors, by safetensors' names for them."""

UNKNOWN = "0" * 32
"""As long as any checksum: stands where one will be."""

_CHECKSUM = "xxh3_128"
_MARKER = f'"{_CHECKSUM}":"'.encode()


class Damage(ValueError):
    """What is wrong with a file, as what follows its name: "is torn: ..."."""


def checksum(data: bytes | memoryview) -> str:
    """XXH3-128, as 32 hexadecimal digits."""
    found: str = xxhash.xxh3_128_hexdigest(data)
    return found


def header(
    tensors: Mapping[str, tuple[str, int]], checksums: Mapping[str, str], metadata: Mapping[str, str], size: int = 0
) -> bytes:
    """What a file begins with. tensors: dtype and number of elements by name, in their order in the file.

    size: bytes that it shall have, at least.
    """
    told = dict(metadata) | {f"{_CHECKSUM}.{name}": checksums[name] for name in tensors}
    tree: dict[str, Any] = {"__metadata__": told | {_CHECKSUM: UNKNOWN}}
    start = 0
    for name, (dtype, numel) in tensors.items():
        end = start + DTYPES[dtype].itemsize * numel
        tree[name] = {"dtype": dtype, "shape": [numel], "data_offsets": [start, end]}
        start = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, size - 8 - len(text))  # the data is aligned, and so can be mapped
    whole = struct.pack("<Q", len(text)) + text
    before, _, after = whole.rpartition(_MARKER + UNKNOWN.encode())
    return before + _MARKER + checksum(whole).encode() + after


def read(file: BinaryIO) -> tuple[dict[str, str], dict[str, Vector]]:
    """The metadata, and by name every tensor, flat and in memory of its own.

    Raises Damage, and OSError where the system refuses, which says nothing about the file.
    """
    metadata, tree, _ = _head(file)
    return metadata, {name: _tensor(file, name, about, metadata) for name, about in tree.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: from byte `begin` on. checksum: as the file has it, which was not looked at."""

    dtype: np.dtype[Any]
    begin: int
    numel: int
    checksum: str


def places(file: BinaryIO) -> dict[str, Place]:
    """By name. Raises as `read` does; of the checksums only the header's is looked at."""
    metadata, tree, data = _head(file)
    found = {}
    for name, about in tree.items():
        dtype, begin = DTYPES[about["dtype"]], data + about["data_offsets"][0]
        found[name] = Place(dtype, begin, _nbytes(about) // dtype.itemsize, metadata[f"{_CHECKSUM}.{name}"])
    return found


def _head(file: BinaryIO) -> tuple[dict[str, str], dict[str, Any], int]:
    """The metadata, what is said of each tensor, and where their data begins, at which the file is read on."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        raise Damage(f"is torn: {size} bytes are not even its header")
    text = file.read(length)
    before, marker, after = text.partition(_MARKER)
    if not marker:
        raise Damage("was not written by parablock, or its header is damaged")
    if after[:32] != checksum(prefix + before + marker + UNKNOWN.encode() + after[32:]).encode():
        raise Damage(f"is damaged: its header does not match its {_CHECKSUM}")
    tree = json.loads(text)  # what matches its checksum is what was written
    metadata: dict[str, str] = tree.pop("__metadata__")
    if size != 8 + length + sum(_nbytes(about) for about in tree.values()):  # before memory is taken for any
        raise Damage(f"is torn: {size} bytes are less, or more, than its header says")
    return metadata, tree, 8 + length


def _tensor(file: BinaryIO, name: str, about: Mapping[str, Any], metadata: Mapping[str, str]) -> Vector:
    data = np.empty(_nbytes(about), np.uint8)
    view = data.data
    while view and (count := file.readinto(view)):  # type: ignore[attr-defined]
        view = view[count:]
    found, expected = checksum(data.data), metadata[f"{_CHECKSUM}.{name}"]
    if found != expected:
        raise Damage(f"is damaged: {_CHECKSUM} of its {name} is {found[:16]}…, written was {expected[:16]}…")
    dtype = DTYPES[about["dtype"]]
    return data.view(dtype).astype(dtype.newbyteorder("="), copy=False)


def _nbytes(about: Mapping[str, Any]) -> int:
    start, end = about["data_offsets"]
    return int(end) - int(start)
