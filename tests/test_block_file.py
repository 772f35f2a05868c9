"""A block on disk: any tool reads it, damage is found and named, and what did not come to be leaves the old version."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from parablock.block_file import BlockFileError, BlockWriter, Label, read

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

LABEL = Label(7, 3, 2, "f" * 64)


def vector(numel: int, seed: int = 0) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(numel).astype(np.float32)
    return values


def write(path: Path, values: Vector, label: Label = LABEL, parts: int = 1) -> None:
    writer = BlockWriter(path, label, values.size)
    for part in np.array_split(values, parts):
        writer.write(part)
    writer.commit()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0007.safetensors"


def test_what_is_written_part_by_part_is_read_back(path: Path) -> None:
    values = np.concatenate([vector(1000), np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)])
    write(path, values, parts=7)
    stored = read(path)
    assert stored.label == LABEL
    assert stored.values.tobytes() == values.tobytes()
    one = path.read_bytes()
    write(path, values)
    assert path.read_bytes() == one, "however it was cut"


def test_safetensors_reads_it(path: Path) -> None:
    values = vector(1001)
    write(path, values)
    loaded = load_file(path)
    assert list(loaded) == ["block"]
    assert loaded["block"].tobytes() == values.tobytes()
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert (metadata["index"], metadata["version"], metadata["round"]) == ("7", "3", "2")
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0, "the data is aligned"


def test_a_block_of_no_round_is_read_back(path: Path) -> None:
    write(path, vector(1), Label(7, 0, -1, "a"))
    assert read(path).label == Label(7, 0, -1, "a")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_torn_anywhere_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / "0007.safetensors"
    write(path, vector(100))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(BlockFileError, match=r"0007\.safetensors cannot be read as a block: .*; restore it"):
        read(path)


def test_every_flipped_bit_of_the_data_is_found(path: Path) -> None:
    write(path, vector(5))
    content = path.read_bytes()
    for bit in range(8 * 20):
        changed = bytearray(content)
        changed[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(BlockFileError, match=r"0007\.safetensors is damaged: xxh3_128 of its data is"):
            read(path)


def test_a_renamed_file_is_found(path: Path) -> None:
    write(path, vector(5))
    other = path.rename(path.with_name("0008.safetensors"))
    with pytest.raises(BlockFileError, match=r"0008\.safetensors holds block 7; was it renamed\?"):
        read(other)


def test_until_it_is_whole_there_is_the_old_version(path: Path) -> None:
    write(path, vector(10))
    writer = BlockWriter(path, Label(7, 4, 3, "a"), 10)
    writer.write(vector(10, seed=1))
    assert read(path).label.version == 3
    writer.commit()
    assert read(path).label.version == 4
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_is_given_up_leaves_the_old_version_and_nothing_else(path: Path) -> None:
    write(path, vector(10))
    writer = BlockWriter(path, Label(7, 4, 3, "a"), 10)
    writer.write(vector(4, seed=1))
    writer.abort()
    assert read(path).label == LABEL
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_version_that_is_not_whole_is_our_own_bug(path: Path) -> None:
    writer = BlockWriter(path, LABEL, 10)
    writer.write(vector(9))
    with pytest.raises(AssertionError, match="not written whole"):
        writer.commit()
    writer.abort()
    assert not list(path.parent.iterdir())


def test_a_disk_that_is_full_is_told_and_leaves_the_old_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, vector(10))
    with monkeypatch.context() as patch, open("/dev/full", "wb", buffering=0) as full:
        writer = BlockWriter(path, Label(7, 4, 3, "a"), 10)
        writer._file.close()
        patch.setattr(writer, "_file", full)
        with pytest.raises(OSError, match=r"No space left") as caught:
            writer.write(vector(10, seed=1))
        assert caught.value.errno == errno.ENOSPC
        writer.abort()
    assert read(path).label == LABEL
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_disk_that_refuses_at_once_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "_write", refuse)
        with pytest.raises(OSError, match="No space left"):
            BlockWriter(path, LABEL, 10)
    assert not list(path.parent.iterdir())


def test_a_write_that_takes_only_a_part_is_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a disk does that is nearly full, and as Linux does beyond 2 GiB.
    values = vector(100)
    writer = BlockWriter(path, LABEL, 100)
    raw = writer._file

    class Short:
        def __getattr__(self, name: str) -> object:
            return getattr(raw, name)

        def write(self, data: memoryview) -> int:
            return raw.write(data[:13])

    monkeypatch.setattr(writer, "_file", Short())
    writer.write(values)
    writer.commit()
    assert read(path).values.tobytes() == values.tobytes()
