"""The versions of blocks: beside each other, the newest one read, a damaged one passed over only where asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from parablock import block_versions
from parablock.block_file import BlockFileError, BlockWriter, Label, StoredBlock
from parablock.block_versions import BlockVersions

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]


def values(count: int = 7, seed: int = 0) -> Vector:
    made: Vector = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return made


def save(versions: BlockVersions, index: int, *numbers: int) -> None:
    for version in numbers:
        versions.save(Label(index, version, "m"), {"block": values(seed=version)}, entry=f"{version}")


def damage(versions: BlockVersions, index: int, version: int) -> None:
    path = versions.path(index, version)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def anything(_path: Path, _stored: StoredBlock) -> None:
    """Every intact version belongs here."""


@pytest.fixture
def versions(tmp_path: Path) -> BlockVersions:
    return BlockVersions(tmp_path)


def test_versions_are_listed_in_the_order_of_their_numbers(versions: BlockVersions) -> None:
    save(versions, 10_000, 3)
    save(versions, 2, 1_000_000, 999_999, 0)
    (versions.folder / "notes.txt").write_text("mine")
    assert versions.listed() == {2: [0, 999_999, 1_000_000], 10_000: [3]}
    assert [(block.label.index, block.label.version) for block in versions.newest()] == [(2, 1_000_000), (10_000, 3)]
    assert BlockVersions(versions.folder / "nowhere").listed() == {}
    assert BlockVersions(versions.folder / "nowhere").partial() == []


def test_a_slice_that_is_not_contiguous_is_stored_as_it_reads(versions: BlockVersions) -> None:
    every_other = values(10)[::2]
    versions.save(Label(0, 1, "m"), {"block": every_other})
    np.testing.assert_array_equal(versions.read(0, 1).values, every_other)


def test_the_newest_intact_version_and_what_is_wrong_with_the_others(versions: BlockVersions) -> None:
    save(versions, 3, 0, 4, 8, 12)
    damage(versions, 3, 8)
    stored, wrong = versions.newest_intact(3, 8, anything)
    assert stored is not None
    assert (stored.label.version, stored.entry) == (4, "4")
    assert stored.values.tobytes() == values(seed=4).tobytes()
    assert len(wrong) == 1
    assert "0003-000008.safetensors is damaged" in wrong[0]
    stored, wrong = versions.newest_intact(3, 12, anything)
    assert stored is not None
    assert (stored.label.version, wrong) == (12, [])
    assert versions.newest_intact(4, 12, anything) == (None, [])
    damage(versions, 3, 4)
    damage(versions, 3, 0)
    stored, wrong = versions.newest_intact(3, 8, anything)
    assert stored is None
    assert len(wrong) == 3


def test_superseded_are_those_beyond_the_newest_of_each_block(versions: BlockVersions) -> None:
    save(versions, 0, 0, 1, 5)
    save(versions, 1, 0)
    assert versions.superseded(0, keep=2) == [versions.path(0, 0)]
    assert versions.superseded(0, keep=1) == [versions.path(0, 0), versions.path(0, 1)]
    assert versions.superseded(1, keep=1) == versions.superseded(2, keep=1) == []
    with pytest.raises(AssertionError):
        versions.superseded(0, keep=0)


def test_who_reads_while_a_broker_drops_versions_gets_the_newer_one(
    versions: BlockVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(versions, 0, 1, 2)
    read = block_versions.read

    def meanwhile(path: Path) -> StoredBlock:
        if path == versions.path(0, 2) and path.exists():
            save(versions, 0, 4)
            path.unlink()
        return read(path)

    monkeypatch.setattr(block_versions, "read", meanwhile)
    assert [block.label.version for block in versions.newest()] == [4]


def test_a_damaged_newest_version_is_an_error(versions: BlockVersions) -> None:
    save(versions, 0, 1, 2)
    damage(versions, 0, 2)
    with pytest.raises(BlockFileError, match=r"0000-000002\.safetensors is damaged"):
        list(versions.newest())


def test_a_crash_before_the_rename_leaves_the_older_version(
    versions: BlockVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(versions, 0, 1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(versions, 0, 2)
    assert versions.listed() == {0: [1]}
    assert [path.name for path in versions.partial()] == [".0000-000002.safetensors.partial"]
    save(versions, 0, 2)  # over what the crash left
    assert versions.listed() == {0: [1, 2]}
    assert not versions.partial()


def test_the_version_is_on_disk_before_its_name_is(versions: BlockVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        happened.append("fsync " + ("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file"))
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        happened.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save(versions, 0, 1)
    assert happened == ["fsync file", "rename", "fsync folder"]


def test_a_disk_that_refuses_leaves_no_version(versions: BlockVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for where in ("write", "commit"):
        with monkeypatch.context() as patch:
            patch.setattr(BlockWriter, where, refuse)
            with pytest.raises(OSError, match="No space left"):
                save(versions, 0, 1)
        assert not list(versions.folder.iterdir())


def test_a_block_of_another_dtype_is_our_own_bug(versions: BlockVersions) -> None:
    with pytest.raises(AssertionError, match="float64"):
        versions.save(Label(0, 1, "m"), {"block": np.zeros(7)})  # type: ignore[dict-item]
    with pytest.raises(AssertionError, match=r"one flat vector, got the shape \(2, 2\)"):
        versions.save(Label(0, 1, "m"), {"block": values(4).reshape(2, 2)})
    assert not list(versions.folder.iterdir())
