"""Vectors that leave the memory for a file: what is read of them afterwards, and where it cannot be."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest

from parablock import tensor_file
from parablock.tensor_file import Reader
from workers.spill import Spillable, StoredVector
from workers.state_folder import DiskError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

NUMEL = 1000


class Memory(np.ndarray):  # type: ignore[type-arg]
    """Of which it shows when it goes."""


class Made:
    """A vector that is there."""

    numel = NUMEL

    def __init__(self) -> None:
        self._values = values().view(Memory)
        self.alive = weakref.ref(self._values)

    def wait(self) -> Vector:
        return self._values


def values() -> Vector:
    return np.random.default_rng(0).standard_normal(NUMEL).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vectors"
    tensor_file.write(path, {"other": values()[:3], "one": values()}, {})
    return path


def test_it_is_the_same_before_and_after_and_its_memory_goes(file: Path) -> None:
    made = Made()
    alive, one = made.alive, Spillable(made)
    del made
    parts = [slice(0, 10), slice(990, 2000), slice(7, 7), slice(None)]
    before = [one[part].tobytes() for part in parts]
    stored = StoredVector(Reader(file), "one")
    file.unlink()  # a round is closed while it is still being read
    one.spill(stored)
    gc.collect()
    assert alive() is None
    assert [one[part].tobytes() for part in parts] == before
    assert one.wait().tobytes() == values().tobytes()
    assert (one.size, one.numel) == (NUMEL, NUMEL)


def test_a_part_is_read_into_memory_of_its_own_and_no_more(file: Path) -> None:
    stored = StoredVector(Reader(file), "one")
    first, again = stored[10:20], stored[10:20]
    assert first.base is None or first.base.nbytes == first.nbytes
    assert not np.shares_memory(first, again)
    assert first.dtype == np.float32


def test_a_file_that_has_become_shorter_is_told(file: Path) -> None:
    one = Spillable(Made())
    one.spill(StoredVector(Reader(file), "one"))
    with file.open("r+b") as torn:
        torn.truncate(file.stat().st_size - 8)
    assert one[:10].tobytes() == values()[:10].tobytes()
    with pytest.raises(DiskError, match=r"vectors is torn: it ends at byte \d+, within its one, and was whole"):
        one.wait()


def test_a_disk_that_refuses_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredVector(Reader(file), "one")

    def refuse(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", refuse)
    with pytest.raises(DiskError, match=r"cannot read .*vectors: Input/output error; it is left as it is"):
        _ = stored[:]


def test_a_vector_is_known_by_its_checksum(file: Path) -> None:
    reader = Reader(file)
    changed = values()
    changed[5] += 1
    assert reader.holds("one", values())
    assert not reader.holds("one", changed)
    assert not reader.holds("two", values())


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(b"no such file")
    with pytest.raises(tensor_file.TensorFileError, match="is torn"):
        Reader(path)
