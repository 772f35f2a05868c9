"""The worker's folder: what comes back of it, what does not and how that is said, and whose it is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import folder_lock
from parablock.tensor_file import Tensors
from workers.state_folder import (
    Contribution,
    DiskError,
    Identity,
    LandedBlock,
    Position,
    State,
    StateError,
    StateFolder,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

WHO = Identity("us", "run-1", "d1")


def vector(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(100).astype(np.float32)


def contribution(round: int, block: int, **changes: Any) -> Contribution:
    return Contribution(**{**vars(Contribution(round, block, 7, 2, 0.5, True, (0.25, 1 / 3), -1)), **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def filled(folder: StateFolder) -> Position:
    """Rounds 0 to 3 of three blocks are behind; those of 2 and 3 are on their way, and 0 has landed."""
    assert folder.begin(WHO) is None
    folder.write_block(LandedBlock(0, 0, (0.1, None), False, 2, 0.5), vector(0))
    folder.write_contribution(contribution(2, 2), vector(2), [np.arange(9, dtype=np.uint8)])
    folder.write_contribution(contribution(3, 0, built_on=0), vector(3), [])
    folder.write_residual(2, 2, vector(4))
    folder.write_optimizer(2, 2, Tensors({"0.exp_avg": vector(5)}, {"masters": 1, "state": []}))
    position = Position(4, 1, True, 2, {2: 2, 3: 0}, {2: 2}, {2: 2})
    folder.write_position(position)
    return position


def again(path: Path, who: Identity = WHO) -> State | None:
    folder = StateFolder(path)
    try:
        return folder.begin(who)
    finally:
        folder.close()


def files(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*.safetensors")}


def refusing(which: int) -> Any:
    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(which, os.strerror(which))

    return refuses


def left(path: Path) -> State:
    state = again(path)
    assert state is not None
    return state


@pytest.fixture
def kept(path: Path) -> Path:
    folder = StateFolder(path)
    filled(folder)
    folder.close()
    return path


def test_what_was_written_comes_back(path: Path) -> None:
    folder = StateFolder(path)
    position = filled(folder)
    folder.close()
    state = left(path)
    assert state.position == position
    assert state.blocks == {0: LandedBlock(0, 0, (0.1, None), False, 2, 0.5)}
    assert {round: spooled.made for round, spooled in state.contributions.items()} == {
        2: contribution(2, 2),
        3: contribution(3, 0, built_on=0),
    }
    assert state.contributions[2].delta.tobytes() == vector(2).tobytes()
    assert [chunk.tobytes() for chunk in state.contributions[2].chunks] == [bytes(range(9))]
    assert state.residuals[2].tobytes() == vector(4).tobytes()
    assert list(state.optimizer) == [2]
    again_open = StateFolder(path)
    assert again_open.block(0).tobytes() == vector(0).tobytes()
    assert again_open.optimizer(2, 2).vectors["0.exp_avg"].tobytes() == vector(5).tobytes()
    again_open.close()


def test_nobody_else_may_read_it(kept: Path) -> None:
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in kept.rglob("*") if each.is_file()} == {0o600}
    assert {stat.S_IMODE(each.stat().st_mode) for each in kept.rglob("*") if each.is_dir()} == {0o700}


def test_a_folder_that_was_there_becomes_the_users_own(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)
    (path / ".worker.json.partial").touch(0o644)
    assert again(path) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "worker.json").stat().st_mode) == 0o600


def test_a_strangers_folder_keeps_its_mode(path: Path) -> None:
    (path / "blocks").mkdir(parents=True)
    path.chmod(0o755)
    with pytest.raises(StateError, match="no worker's state"):
        StateFolder(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_made_private_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refusing(errno.EPERM))
    with pytest.raises(StateError, match=f"cannot use {path}: Operation not permitted"):
        StateFolder(path)


def test_what_the_position_has_not_passed_is_as_if_it_had_never_been(kept: Path) -> None:
    folder = StateFolder(kept)
    folder.begin(WHO)
    folder.write_optimizer(1, 4, Tensors({}, {"masters": 0, "state": []}))
    folder.write_residual(2, 5, vector(6))
    folder.write_contribution(contribution(4, 1), vector(7), [])
    folder.close()
    before = left(kept)
    assert sorted(before.contributions) == [2, 3]
    assert before.residuals[2].tobytes() == vector(4).tobytes()
    assert sorted(before.optimizer) == [2]
    assert not {"contributions/000004.safetensors", "residuals/0002-000005.safetensors"} & files(kept)


def test_what_has_landed_needs_no_contribution_any_more(kept: Path) -> None:
    folder = StateFolder(kept)
    folder.begin(WHO)
    folder.write_block(LandedBlock(2, 2, None, False, 4, 0.0), vector(8))
    folder.close()
    assert sorted(left(kept).contributions) == [3]


DAMAGE = {
    "blocks/0000.safetensors": "the block is pulled again",
    "contributions/000003.safetensors": "the round does without it",
    "residuals/0002-000002.safetensors": "begins anew",
    "optimizer/0002-000002.safetensors": "begins anew",
    "position.safetensors": "where the earlier process was is not known",
}


@pytest.mark.parametrize("how", ["torn", "flipped", "missing"])
@pytest.mark.parametrize("file", DAMAGE)
def test_what_is_damaged_is_said_and_not_loaded(
    file: str, how: str, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray((kept / file).read_bytes())
    content[-20] ^= 4
    if how == "missing":
        (kept / file).unlink()
    else:
        (kept / file).write_bytes(content[:-50] if how == "torn" else content)
    state = left(kept)
    held = {
        "blocks/0000.safetensors": 0 in state.blocks,
        "contributions/000003.safetensors": 3 in state.contributions,
        "residuals/0002-000002.safetensors": 2 in state.residuals,
        "optimizer/0002-000002.safetensors": 2 in state.optimizer,
        "position.safetensors": state.position is not None,
    }
    if file == "position.safetensors":
        assert held == {**dict.fromkeys(held, False), "blocks/0000.safetensors": True}
    else:
        assert held == {**dict.fromkeys(held, True), file: False}
    if (file, how) == ("contributions/000003.safetensors", "missing"):
        assert "nothing of the contribution to round 3" in caplog.text
    elif (file, how) != ("blocks/0000.safetensors", "missing"):  # as if it had never landed
        assert str(kept / file) in caplog.text
        assert DAMAGE[file] in caplog.text
    assert how == "missing" or file not in files(kept)


@pytest.mark.parametrize("which", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("file", ["worker.json", *DAMAGE])
def test_what_cannot_be_read_just_now_is_left_as_it_is(
    file: str, which: int, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, opens = files(kept), Path.open

    def refuses(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == kept / file:
            raise OSError(which, os.strerror(which))
        return opens(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(DiskError, match=rf"cannot read {kept / file}: {os.strerror(which)}"):
        again(kept)
    monkeypatch.undo()
    assert files(kept) == before
    state = left(kept)
    assert (sorted(state.contributions), sorted(state.residuals), sorted(state.optimizer)) == ([2, 3], [2], [2])


def test_a_folder_that_cannot_be_listed_is_not_empty(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.listdir

    def refuses(path: Path) -> list[str]:
        if path == kept / "blocks":
            raise OSError(errno.EMFILE, "Too many open files")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuses)
    with pytest.raises(DiskError, match="Too many open files"):
        again(kept)
    monkeypatch.undo()
    assert sorted(left(kept).contributions) == [2, 3]


def test_two_workers_do_not_share_a_folder(path: Path) -> None:
    folder = StateFolder(path)
    with pytest.raises(StateError, match=f"process {os.getpid()}"):
        StateFolder(path)
    folder.close()
    StateFolder(path).close()


def test_anothers_folder_is_refused(kept: Path) -> None:
    with pytest.raises(StateError, match=r"the worker 'us', not of 'them'.*take part under that name"):
        again(kept, Identity("them", "run-1", "d1"))
    assert sorted(left(kept).contributions) == [2, 3], "it is as it was"


@pytest.mark.parametrize("who", [Identity("us", "run-2", "d1"), Identity("us", "run-1", "d2")])
def test_another_runs_state_is_put_aside(who: Identity, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = files(kept)
    assert again(kept, who) is None
    assert "not used" in caplog.text
    assert files(kept / "aside-run-1") == before
    assert again(kept, who) is not None, "it is this one's now"


def test_what_another_version_has_written_is_put_aside(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = json.loads((kept / "worker.json").read_text())
    (kept / "worker.json").write_text(json.dumps({**tree, "format": 99}))
    assert again(kept) is None
    assert "another version's" in caplog.text
    assert (kept / "aside-unknown").exists()


@pytest.mark.parametrize("theirs", ["blocks", "config.toml", "lock.txt"])
def test_a_folder_that_is_something_elses_is_left_alone(theirs: str, path: Path) -> None:
    path.mkdir()
    (path / "lock").touch()
    (path / theirs).mkdir()
    with pytest.raises(StateError, match=rf"no worker's state: it holds '{theirs}'.*new or empty"):
        StateFolder(path)
    assert set(os.listdir(path)) == {"lock", theirs}


def test_a_process_that_was_killed_before_it_said_whose_it_is_is_no_stranger(path: Path) -> None:
    StateFolder(path).close()
    (path / ".worker.json.partial").touch()
    (path / "aside-run-0").mkdir()
    assert again(path) is None
    assert set(os.listdir(path)) > {"lock", "worker.json", "aside-run-0"}


def test_a_worker_killed_as_it_puts_something_aside_goes_on_with_that(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace, moves = files(kept), Path.replace, iter(range(3))

    def killed(self: Path, target: Path) -> Path:
        if next(moves, None) is None:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        again(kept, Identity("us", "run-2", "d1"))
    monkeypatch.undo()
    assert again(kept, Identity("us", "run-2", "d1")) is None
    assert {file.split("/", 1)[1] for file in files(kept)} == before


def test_partly_written_files_go_but_only_its_own(kept: Path) -> None:
    ours = [
        ".position.safetensors.partial",
        "blocks/.0001.safetensors.partial",
        "optimizer/.0001-000004.safetensors.partial",
    ]
    theirs = ["mine/.0001.safetensors.partial", ".mine.partial", "blocks/.mine.partial"]
    (kept / "mine").mkdir()
    for file in ours + theirs:
        (kept / file).touch()
    left(kept)
    assert [(kept / file).exists() for file in ours] == [False] * 3
    assert [(kept / file).exists() for file in theirs] == [True] * 3


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="choose another --state, or none"):
        StateFolder(tmp_path / "file" / "state")


def test_a_full_disk_need_not_note_who_holds_the_lock(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.os, "write", refusing(errno.ENOSPC))
        folder = StateFolder(kept)
    with pytest.raises(StateError, match=r"is in use by .*, or choose another --state"):
        StateFolder(kept)
    folder.close()


@pytest.mark.parametrize("call", ["mkdir", "write_text", "replace", "unlink"])
def test_a_disk_that_refuses_at_the_start_leaves_all_as_it_was(
    call: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept / ".position.safetensors.partial").touch()
    before = files(kept)
    monkeypatch.setattr(Path, call, refusing(errno.ENOSPC))
    with pytest.raises(DiskError, match=f"cannot use {kept}: No space left on device"):
        again(kept)
    monkeypatch.undo()
    assert files(kept) == before
    assert sorted(left(kept).contributions) == [2, 3]


def test_a_disk_that_refuses_a_lock_is_not_another_worker(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    with pytest.raises(DiskError, match="No locks available"):
        StateFolder(path)


def test_removed_with_all_in_it_but_what_is_not_its_own(kept: Path) -> None:
    (kept / "mine.txt").touch()
    folder = StateFolder(kept)
    folder.remove()
    folder.close()
    assert os.listdir(kept) == ["mine.txt"]
