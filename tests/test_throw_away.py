"""The keys of a run on one machine: what is ours is known by its mark, and nothing else is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from broker import pairs
from parablock import throw_away
from parablock.keys import KeyFileError
from parablock.run_folder import RunFolderError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_what_is_ours_is_deleted_whole(run: Path) -> None:
    pairs.make_throw_away(run / "keys", ["worker-0", "worker-1"])
    (run / "keys" / ".worker-1.secret.0a1b2c3d").touch()  # as a kill may leave it
    assert throw_away.throw_away_keys(run) == run / "keys"
    throw_away.check_ours(run / "keys", "")
    throw_away.remove(run / "keys")
    assert not list(run.iterdir())
    throw_away.remove(run / "keys")  # again does nothing


@pytest.mark.parametrize("how", ["no mark", "a mark of something else", "a link to one of ours", "a linked mark"])
def test_what_is_not_is_neither_used_nor_deleted(run: Path, how: str) -> None:
    folder = run / "keys"
    if how == "a link to one of ours":
        pairs.make_throw_away(run / "elsewhere", ["worker-0"])
        folder.symlink_to(run / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
        pairs.new_pair(folder, "worker-0")
    if how == "a mark of something else":
        (folder / "throw-away").write_text("worker-0\n../../etc\n")
    elif how == "a linked mark":
        (run / "names").write_text("worker-0\n")
        (folder / "throw-away").symlink_to(run / "names")
    before = sorted(run.rglob("*"))
    assert throw_away.throw_away_keys(run) is None
    with pytest.raises(RunFolderError, match="is there and is not of a run; look into it"):
        throw_away.check_ours(folder, "look into it")
    throw_away.remove(folder)
    assert sorted(run.rglob("*")) == before


def test_none_are_made_where_there_may_be_others(run: Path) -> None:
    (run / "keys").mkdir()
    with pytest.raises(KeyFileError, match="is there already, and there may be keys in it"):
        pairs.make_throw_away(run / "keys", ["worker-0"])
    assert not list((run / "keys").iterdir())
