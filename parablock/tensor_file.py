"""A file of named flat vectors and some facts about them, that is read back as it was written or not at all.

The format is safetensors' own (https://github.com/huggingface/safetensors#format), so that any tool reads it. It is
written here because each vector goes to the file from where it lies, and comes back into memory of its own, without a
copy of the whole file beside it. Every vector has an XXH3-128 in the metadata, and so has the header itself: against
torn and flipped bits, not against forgery. A file is written beside the old one and takes its place when it is whole.
It outlives the process that wrote it; whether it outlives a power cut is up to the disk, unless that is waited for
(`synced`).
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

from parablock import placement

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER_BYTES = 16 << 20


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
    header = _header(vectors, {name: _digest(view) for name, view in views.items()}, facts)
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
        table, facts = _read_header(path, file)
        vectors = {name: _read_vector(path, file, name, entry) for name, entry in table.items()}
        if file.read(1):
            raise TensorFileError(f"{path} is longer than it says")
    return Tensors(vectors, facts)


def _view(values: Vector) -> memoryview:
    assert values.dtype in _NAMES, f"vectors are float32 or uint8, got {values.dtype}"
    assert values.ndim == 1, f"vectors are flat, got the shape {values.shape}"
    assert values.flags.c_contiguous, "vectors are contiguous"
    if not values.size:
        return memoryview(b"")  # which cannot be cast
    return values.astype(values.dtype.newbyteorder("<"), copy=False).data.cast("B")


def _header(vectors: Mapping[str, Vector], sums: Mapping[str, str], facts: Mapping[str, Any]) -> bytes:
    table: dict[str, Any] = {}
    end = 0
    for name, values in vectors.items():
        begin, end = end, end + values.nbytes
        table[name] = {"dtype": _NAMES[values.dtype], "shape": [values.size], "data_offsets": [begin, end]}
    told = {"facts": json.dumps(facts, allow_nan=False), "checksums": json.dumps(sums)}
    told["header"] = _digest(_signed(told, table))
    text = json.dumps({"__metadata__": told, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned, and so can be mapped
    return struct.pack("<Q", len(text)) + text


def _signed(told: Mapping[str, str], table: Mapping[str, Any]) -> bytes:
    """What the header's own checksum is of."""
    return json.dumps([told["facts"], told["checksums"], table], sort_keys=True).encode()


def _read_header(path: Path, file: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table, each entry with its checksum, and the facts."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MOST_HEADER_BYTES + 1
    if length > _MOST_HEADER_BYTES:
        raise TensorFileError(f"{path} is damaged: it does not begin with a header")
    try:
        table = json.loads(file.read(length))
        told = table.pop("__metadata__")
        if told["header"] != _digest(_signed(told, table)):
            raise TensorFileError(f"{path} is damaged: its header's checksum does not match")
        sums = json.loads(told["checksums"])
        return {name: {**entry, "checksum": sums[name]} for name, entry in table.items()}, json.loads(told["facts"])
    except TensorFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} is damaged: its header cannot be read ({error!r})") from error


def _read_vector(path: Path, file: Any, name: str, entry: Mapping[str, Any]) -> Vector:
    (numel,) = entry["shape"]
    dtype = _DTYPES[entry["dtype"]]
    if os.fstat(file.fileno()).st_size < file.tell() + numel * dtype.itemsize:  # before memory is taken for it
        raise TensorFileError(f"{path} is damaged: it ends before {name!r} does")
    values: Vector = np.empty(numel, dtype)
    view = _view(values)
    while view:
        count = file.readinto(view)
        if not count:
            raise TensorFileError(f"{path} is damaged: it ends before {name!r} does")
        view = view[count:]
    if (found := _digest(_view(values))) != entry["checksum"]:
        raise TensorFileError(
            f"{path} is damaged: the checksum of {name!r} is {found[:16]}…, written was {entry['checksum'][:16]}…"
        )
    return values


def _digest(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)
