"""A version on disk: any tool reads it, every flipped bit is found, and what did not come to be leaves nothing."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from parablock import block_file
from parablock.block_file import BlockFileError, BlockWriter, Label, file_name, numbers, read

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

LABEL = Label(7, 3, "f" * 64)
NAMES = ("block", "server.first", "server.second", "residual")
ENTRY = '{"round": 2, "clients": ["ä"]}'


def vector(numel: int, seed: int = 0) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(numel).astype(np.float32)
    return values


def tensors(numel: int) -> dict[str, Vector]:
    return {name: vector(numel, seed) for seed, name in enumerate(NAMES)}


def write(path: Path, made: dict[str, Vector], label: Label = LABEL, parts: int = 1, entry: str = ENTRY) -> None:
    writer = BlockWriter(path, label, made["block"].size, tuple(made))
    for part in zip(*(np.array_split(each, parts) for each in made.values()), strict=True):
        writer.write(dict(zip(made, part, strict=True)))
    writer.commit(entry)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0007-000003.safetensors"


def test_what_is_written_part_by_part_is_read_back(path: Path) -> None:
    odd = np.concatenate([vector(1000), np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)])
    made = tensors(1004) | {"block": odd}
    write(path, made, parts=7)
    stored = read(path)
    assert (stored.label, stored.entry) == (LABEL, ENTRY)
    assert {name: each.tobytes() for name, each in stored.tensors.items()} == {
        name: each.tobytes() for name, each in made.items()
    }
    assert stored.values.tobytes() == odd.tobytes()
    assert stored.state.keys() == {"first", "second"}
    assert stored.state["second"].tobytes() == made["server.second"].tobytes()
    assert stored.residual is not None
    one = path.read_bytes()
    write(path, made)
    assert path.read_bytes() == one, "however it was cut"


def test_safetensors_reads_it(path: Path) -> None:
    made = tensors(1001)
    write(path, made)
    loaded = load_file(path)
    assert loaded.keys() == {*NAMES, "entry"}
    assert loaded["block"].tobytes() == made["block"].tobytes()
    assert loaded["residual"].tobytes() == made["residual"].tobytes()
    assert loaded["entry"].tobytes().decode() == ENTRY
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert (metadata["index"], metadata["version"], metadata["manifest"]) == ("7", "3", "f" * 64)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0, "the data is aligned"


def test_a_version_of_no_round_is_the_block_alone(tmp_path: Path) -> None:
    path = tmp_path / file_name(7, 0)
    write(path, {"block": vector(1)}, Label(7, 0, "a"), entry="")
    stored = read(path)
    assert (stored.label, stored.label.round) == (Label(7, 0, "a"), -1)
    assert (stored.state, stored.residual, stored.entry) == ({}, None, "")
    assert list(load_file(path)) == ["block"]


@settings(deadline=None)
@given(index=st.integers(0, 10**6), version=st.integers(0, 10**8))
def test_a_name_says_index_and_version(index: int, version: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert numbers(tmp_path_factory.getbasetemp() / file_name(index, version)) == (index, version)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_torn_anywhere_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / file_name(7, 3)
    write(path, tensors(50))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(BlockFileError, match=r"0007-000003\.safetensors (is torn|was not written|is damaged).*verify"):
        read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(BlockFileError, match="is torn"):
        read(path)


def test_every_flipped_bit_of_the_file_is_found(path: Path) -> None:
    write(path, {"block": vector(5), "residual": vector(5)}, entry='{"round":2}')
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(BlockFileError, match=r"0007-000003\.safetensors (is damaged|is torn|was not written)"):
            read(path)


def test_which_tensor_is_damaged_is_told(path: Path) -> None:
    write(path, tensors(5), entry="")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BlockFileError, match="xxh3_128 of its residual is"):
        read(path)


def test_a_renamed_file_is_found(path: Path) -> None:
    write(path, tensors(5))
    other = path.rename(path.with_name(file_name(8, 3)))
    with pytest.raises(BlockFileError, match=r"0008-000003.* holds block 7, version 3; was it renamed\? Give it back"):
        read(other)
    nobody = other.rename(path.with_name("7.safetensors"))
    with pytest.raises(BlockFileError, match=r"is not named as a version of a block, like 0003-000018\.safetensors"):
        read(nobody)


def test_what_is_not_there_or_not_ours_is_told(path: Path) -> None:
    with pytest.raises(BlockFileError, match="is not there; `parablock verify`"):
        read(path)
    save_file({"block": vector(7)}, path)
    with pytest.raises(BlockFileError, match="was not written by parablock"):
        read(path)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("step", ["open", "read"])
def test_what_cannot_be_read_for_the_moment_is_no_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    write(path, tensors(5))

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((type(path), "open") if step == "open" else (block_file, "_read")), refuse)
    with pytest.raises(OSError, match=r"while .*0007-000003\.safetensors was read; where that lasts") as caught:
        read(path)
    assert caught.value.errno == number


def test_until_it_is_whole_it_is_not_there(path: Path) -> None:
    writer = BlockWriter(path, LABEL, 10)
    writer.write({"block": vector(10, seed=1)})
    assert not path.exists()
    writer.commit()
    assert read(path).label == LABEL
    assert list(path.parent.iterdir()) == [path]


def test_what_is_given_up_leaves_nothing(path: Path) -> None:
    writer = BlockWriter(path, LABEL, 10)
    writer.write({"block": vector(4, seed=1)})
    writer.abort()
    assert not list(path.parent.iterdir())


def test_a_version_that_is_not_whole_is_our_own_bug(path: Path) -> None:
    writer = BlockWriter(path, LABEL, 10, NAMES)
    writer.write(tensors(9))
    with pytest.raises(AssertionError, match="not written whole"):
        writer.commit()
    with pytest.raises(AssertionError, match="parts of"):
        writer.write({"block": vector(1)})
    writer.abort()
    with pytest.raises(AssertionError, match="without its block"):
        BlockWriter(path, LABEL, 10, ("residual",))
    assert not list(path.parent.iterdir())


def test_a_disk_that_is_full_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, open("/dev/full", "wb", buffering=0) as full:
        writer = BlockWriter(path, LABEL, 10)
        writer._file.close()
        patch.setattr(writer, "_file", full)
        with pytest.raises(OSError, match=r"No space left") as caught:
            writer.write({"block": vector(10, seed=1)})
        assert caught.value.errno == errno.ENOSPC
        writer.abort()
    assert not list(path.parent.iterdir())


def test_a_write_that_takes_only_a_part_is_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a disk does that is nearly full, and as Linux does beyond 2 GiB.
    made = tensors(100)
    writer = BlockWriter(path, LABEL, 100, NAMES)
    raw = writer._file

    class Short:
        def __getattr__(self, name: str) -> object:
            return getattr(raw, name)

        def write(self, data: memoryview) -> int:
            return raw.write(data[:13])

    monkeypatch.setattr(writer, "_file", Short())
    writer.write(made)
    writer.commit(ENTRY)
    assert read(path).values.tobytes() == made["block"].tobytes()
