"""Named vectors on disk: whole or not at all, and damage is found wherever it is."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from parablock import tensor_file
from parablock.tensor_file import TensorFileError

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[Any]

FACTS = {"round": 17, "alpha": [0.1, None, 1 / 3], "name": "ä"}


def vectors() -> dict[str, Vector]:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[:3] = np.nan, -0.0, 1e-45
    return {"delta": values, "chunks": np.arange(77, dtype=np.uint8), "none": np.empty(0, np.float32)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def test_what_is_read_is_what_was_written(path: Path) -> None:
    written = tensor_file.write(path, vectors(), FACTS)
    found = tensor_file.read(path)
    assert found.facts == FACTS
    assert {name: (v.dtype, v.tobytes()) for name, v in found.vectors.items()} == {
        name: (v.dtype, v.tobytes()) for name, v in vectors().items()
    }
    assert written == path.stat().st_size
    assert os.listdir(path.parent) == [path.name]


def test_other_tools_read_it(path: Path) -> None:
    tensor_file.write(path, vectors(), FACTS)
    assert {name: v.tobytes() for name, v in load_file(path).items()} == {
        name: v.tobytes() for name, v in vectors().items()
    }


def test_facts_alone(path: Path) -> None:
    tensor_file.write(path, {}, FACTS, private=True)
    assert tensor_file.read(path).facts == FACTS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_file_is_not_a_damaged_one(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tensor_file.read(path)


@pytest.mark.parametrize("which", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_just_now_is_not_damaged(path: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_file.write(path, vectors(), FACTS)

    def refuses(*_: object, **__: object) -> None:
        raise OSError(which, os.strerror(which))

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(OSError, match=os.strerror(which)) as caught:
        tensor_file.read(path)
    assert caught.value.errno == which


def test_a_bit_that_flips_anywhere_is_found(path: Path) -> None:
    tensor_file.write(path, {name: v[:8] for name, v in vectors().items()}, FACTS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        torn = bytearray(whole)
        torn[place] ^= 1 << place % 8
        path.write_bytes(torn)
        with pytest.raises(TensorFileError, match=r"some\.safetensors"):
            tensor_file.read(path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_file_that_was_cut_off_is_found(path: Path, keep: int) -> None:
    tensor_file.write(path, vectors(), FACTS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TensorFileError, match=r"some\.safetensors"):
        tensor_file.read(path)


def test_a_file_with_something_behind_it_is_found(path: Path) -> None:
    tensor_file.write(path, vectors(), FACTS)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TensorFileError, match=r"is torn: .* less, or more"):
        tensor_file.read(path)


def test_where_the_disk_refuses_the_old_file_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_file.write(path, {}, {"which": "old"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        tensor_file.write(path, vectors(), {"which": "new"})
    assert tensor_file.read(path).facts == {"which": "old"}
    assert os.listdir(path.parent) == [path.name]
