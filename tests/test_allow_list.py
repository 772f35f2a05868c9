"""The list of clients: one name a key, one key a name, and a file that is whole or refused."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
import zmq

from parablock import allow_list, keys
from parablock.allow_list import AllowList, Client
from parablock.folder_lock import FolderLock
from parablock.keys import KeyFileError, PublicKey

if TYPE_CHECKING:
    from pathlib import Path


def key() -> str:
    return zmq.curve_keypair()[0].decode()


def test_clients_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert AllowList.read(folder).clients == ()
    us, them = PublicKey("us", key()), PublicKey("them", key())
    allow_list.allow(folder, us, "noon")
    assert allow_list.allow(folder, them, "one", name="hospital-2").name == "hospital-2"
    assert AllowList.read(folder).clients == (Client("us", us.key, "noon"), Client("hospital-2", them.key, "one"))
    assert allow_list.revoke(folder, "us", "two").key == us.key
    assert AllowList.read(folder).names == {them.key: "hospital-2"}
    assert sorted(path.name for path in folder.iterdir()) == ["clients.toml", "lock"]


def test_a_name_and_a_key_come_once(tmp_path: Path) -> None:
    us = PublicKey("us", key())
    allow_list.allow(tmp_path, us, "noon")
    before = (tmp_path / "clients.toml").read_bytes()
    with pytest.raises(KeyFileError, match=r"there is a client us already; choose --name ANOTHER"):
        allow_list.allow(tmp_path, PublicKey("us", key()), "noon")
    with pytest.raises(KeyFileError, match=r"the key of them \(fingerprint .*\) is that of us already"):
        allow_list.allow(tmp_path, PublicKey("them", us.key), "noon")
    with pytest.raises(KeyFileError, match=r"broker is the broker's own name"):
        allow_list.allow(tmp_path, PublicKey("broker", key()), "noon")
    with pytest.raises(KeyFileError, match=r"a name has 1 to 64"):
        allow_list.allow(tmp_path, PublicKey("us", key()), "noon", name="../up")
    with pytest.raises(KeyFileError, match=r"there is no client them on the list .*; there is: us"):
        allow_list.revoke(tmp_path, "them", "noon")
    assert (tmp_path / "clients.toml").read_bytes() == before


def test_only_one_process_changes_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "noon", "parablock keys")
    with pytest.raises(KeyFileError, match="is in use by parablock keys"):
        allow_list.allow(tmp_path, PublicKey("us", key()), "noon")
    lock.release()
    allow_list.allow(tmp_path, PublicKey("us", key()), "noon")


@pytest.mark.parametrize(
    "text",
    ["[[client]", "client = 1", "client = [1]", "[[client]]\nname = 'us'", "[[client]]\nname = 1\nkey = 2\nsince = 3"],
)
def test_a_damaged_list_is_refused_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "clients.toml").write_text(text)
    with pytest.raises(KeyFileError, match=r"clients\.toml is damaged: .*restore it, or delete it"):
        AllowList.read(tmp_path)


def test_a_list_with_a_key_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text('[[client]]\nname = "us"\nkey = "short"\nsince = ""\n')
    with pytest.raises(KeyFileError, match=r"clients\.toml is wrong: a key is 40 characters"):
        AllowList.read(tmp_path)


@pytest.mark.parametrize("text", ["[[clients]]\nname = 'us'", "extra = 1"])
def test_a_list_with_something_else_on_it_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "clients.toml").write_text(text)
    with pytest.raises(KeyFileError, match=r"clients\.toml is wrong: it has (clients|extra), and holds nothing but"):
        AllowList.read(tmp_path)


def test_a_list_that_others_may_change_is_refused(tmp_path: Path) -> None:
    allow_list.allow(tmp_path, PublicKey("us", key()), "noon")
    (tmp_path / "clients.toml").chmod(0o666)
    with pytest.raises(KeyFileError, match=r"may be changed by others \(mode 0666\)"):
        AllowList.read(tmp_path)


def test_gone_is_whose_key_is_not_theirs_any_more() -> None:
    one, two, three = key(), key(), key()
    before = AllowList((Client("a", one, ""), Client("b", two, ""), Client("c", three, "")))
    after = AllowList((Client("a", one, "later"), Client("b", key(), ""), Client("d", three, "")))
    assert before.gone(after) == ["b", "c"]


@pytest.mark.parametrize("umask", [0o002, 0, 0o077])
def test_the_list_does_not_hang_on_the_umask(tmp_path: Path, umask: int) -> None:
    us, them = PublicKey("us", key()), PublicKey("them", key())
    keys.make_folder(tmp_path / "keys")
    (tmp_path / "keys" / ".clients.toml.partial").touch(0o666)  # as a kill may leave it
    (tmp_path / "keys" / ".clients.toml.partial").chmod(0o666)
    before = os.umask(umask)
    try:
        for public in (us, them):
            allow_list.allow(tmp_path / "keys", public, "noon")
            assert stat.S_IMODE((tmp_path / "keys" / "clients.toml").stat().st_mode) == 0o600
        allow_list.revoke(tmp_path / "keys", "us", "one")
    finally:
        os.umask(before)
    assert AllowList.read(tmp_path / "keys").names == {them.key: "them"}
    assert stat.S_IMODE((tmp_path / "keys" / "clients.toml").stat().st_mode) == 0o600


def test_it_is_not_said_to_be_done_before_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_list.allow(tmp_path, PublicKey("us", key()), "noon")
    write = allow_list.write_text
    monkeypatch.setattr(allow_list, "write_text", lambda path, text, **_: write(path, text, mode=0o666))
    with pytest.raises(KeyFileError, match="may be changed by others"):
        allow_list.revoke(tmp_path, "us", "one")
    (tmp_path / "clients.toml").chmod(0o600)
    monkeypatch.setattr(allow_list, "write_text", lambda *_, **__: None)
    with pytest.raises(KeyFileError, match="is not what was written just now"):
        allow_list.allow(tmp_path, PublicKey("us", key()), "two")
