"""Key files: what they hold, who may read them, and what is refused as none."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from broker.pairs import new_pair
from parablock import allow_list, keys
from parablock.allow_list import AllowList
from parablock.keys import KeyFileError, PublicKey, SecretKey

if TYPE_CHECKING:
    from pathlib import Path


@given(st.binary(min_size=32, max_size=32))
def test_the_text_of_a_key_is_z85(key: bytes) -> None:
    assert keys.raw(z85.encode(key).decode()) == key


@pytest.mark.parametrize("text", ["", "0" * 39, "0" * 41, "0" * 39 + "'", "0" * 39 + "é", "#" * 40])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(KeyFileError, match=r"a key is 40 characters of Z85|are no Z85"):
        keys.raw(text)


def test_a_fingerprint_is_short_enough_to_be_read_out_and_tells_keys_apart() -> None:
    one, other = (zmq.curve_keypair()[0].decode() for _ in range(2))
    groups = keys.fingerprint(one).split("-")
    assert [len(group) for group in groups] == [4] * 8
    assert keys.fingerprint(one) == keys.fingerprint(one) != keys.fingerprint(other)
    assert keys.fingerprint("0" * 40) == "MZUH-VLPY-MK6X-O3EP-YGFY-5H4O-EAEJ-OFEF"  # the zero bytes' SHA-256


def test_a_pair_is_two_files_and_the_secret_one_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    before = os.umask(0)
    try:
        public = new_pair(folder, "us")
    finally:
        os.umask(before)
    secret = keys.read_secret(folder / "us.secret")
    assert (secret.name, keys.read_public(folder / "us.public")) == ("us", public)
    assert zmq.curve_public(secret.key.encode()).decode() == public.key
    assert stat.S_IMODE((folder / "us.secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert secret.key not in repr(secret)
    with pytest.raises(KeyFileError, match=r"us\.secret is there already"):
        new_pair(folder, "us")
    assert keys.read_secret(folder / "us.secret") == secret


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o601])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    new_pair(tmp_path, "us")
    path = tmp_path / "us.secret"
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"may be read or changed by others \(mode {mode:04o}\).*chmod 600"):
        keys.read_secret(path)
    path.chmod(0o400)
    keys.read_secret(path)


def test_each_kind_is_refused_in_the_place_of_the_other(tmp_path: Path) -> None:
    new_pair(tmp_path, "us")
    (tmp_path / "us.public").chmod(0o600)
    with pytest.raises(KeyFileError, match=r"us\.public holds a public key, and here a secret key is needed"):
        keys.read_secret(tmp_path / "us.public")
    with pytest.raises(KeyFileError, match=r"us\.secret holds a secret key, and .*Never give a secret key to anybody"):
        keys.read_public(tmp_path / "us.secret")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is no key file"),
        ("kind = 1\nname = 'us'\nkey = ''", "is no key file"),
        ("kind = 'public'\nname = 'us'", "is no key file"),
        ("\x00\xff", "is no key file"),
        ("kind = 'public'\nname = 'us'\nkey = 'short'", "holds no usable key: a key is 40 characters"),
        (f"kind = 'public'\nname = '../us'\nkey = '{'0' * 40}'", "holds no usable key: its name is none"),
        (f"kind = 'invite'\nname = 'us'\nkey = '{'0' * 40}'", "is an invite, and here a public key is needed"),
    ],
)
def test_a_file_that_holds_no_key_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "us.public"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(KeyFileError) as caught:
        keys.read_public(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_and_places_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        KeyFileError, match=r"there is no key file .*us\.secret; make a pair with `parablock keys new us`"
    ):
        keys.read_secret(tmp_path / "us.secret")
    with pytest.raises(KeyFileError, match="Is a directory"):
        keys.read_public(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="cannot make the keys folder"):
        keys.make_folder(tmp_path / "file" / "keys")
    with pytest.raises(KeyFileError, match="cannot write"):
        keys.write_pair(tmp_path / "nowhere", SecretKey("us", "0" * 40), PublicKey("us", "0" * 40))
    with pytest.raises(KeyFileError, match="a name has 1 to 64"):
        keys.write_pair(tmp_path, SecretKey(".us", "0" * 40), PublicKey(".us", "0" * 40))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert keys.folder_of_user() == tmp_path / "parablock"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys.folder_of_user() == tmp_path / ".config" / "parablock"


def test_no_character_of_a_secret_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "us.secret"
    secret = "abcde" + "#" * 5 + "f" * 30
    for text in (
        f"kind = 'secret'\nname = 'us'\nkey = '{secret}'",
        f"kind = 'secret'\nname = '{secret}'\nkey = 'us'",
        f"kind = '{secret}'\nname = 'us'\nkey = 'us'",
        f"kind = 'secret'\nname = 'us'\nkey = {secret}",
    ):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(KeyFileError) as caught:
            keys.read_secret(path)
        said = str(caught.value).replace(str(path), "")
        assert not [start for start in range(38) if secret[start : start + 3] in said], said


@pytest.mark.parametrize("there", ["us.secret", "us.public"])
def test_a_pair_is_made_whole_or_not_at_all(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("the only copy")
    with pytest.raises(KeyFileError, match=rf"{there} is there already"):
        new_pair(tmp_path, "us")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "the only copy"


@pytest.mark.parametrize(("function", "call"), [("link", 0), ("link", 1), ("fsync", 0), ("fsync", 1), ("fsync", 2)])
def test_of_a_pair_that_cannot_be_made_nothing_is_left(
    tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    real = getattr(os, function)

    def refuses(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, function, refuses)
    with pytest.raises(KeyFileError, match=r"cannot write .*us: No space left on device"):
        new_pair(tmp_path, "us")
    assert not list(tmp_path.iterdir())


def test_who_comes_in_between_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def late(source: Path, target: Path) -> None:
        if target.suffix == ".public":
            target.write_text("another's")
        real(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(KeyFileError, match=r"us\.public is there already"):
        new_pair(tmp_path, "us")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("us.public", "another's")]


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        (0o777, "others may put their own files into"),
        (0o770, "others may put their own files into"),
        (0o755, "others may look into"),
    ],
)
def test_a_keys_folder_that_is_open_to_others_is_refused(tmp_path: Path, mode: int, complaint: str) -> None:
    folder = tmp_path / "keys"
    public = new_pair(folder, "us")
    allow_list.allow(folder, public, "noon")
    folder.chmod(mode)
    for use in (
        lambda: keys.read_secret(folder / "us.secret"),
        lambda: AllowList.read(folder),
        lambda: allow_list.revoke(folder, "us", "noon"),
        lambda: new_pair(folder, "them"),
    ):
        with pytest.raises(KeyFileError, match=rf"{complaint} the keys folder .* \(mode {mode:04o}\): chmod 700 "):
            use()
    folder.chmod(0o700)
    assert keys.read_secret(folder / "us.secret").name == "us"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("whose", ["us.secret", "clients.toml", "."])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, whose: str) -> None:
    folder = tmp_path / "keys"
    allow_list.allow(folder, new_pair(folder, "us"), "noon")
    os.chown(folder / whose, 65534, 65534)
    with pytest.raises(KeyFileError, match=r"belongs to another user \(number 65534\)"):
        AllowList.read(folder) if whose == "clients.toml" else keys.read_secret(folder / "us.secret")


@pytest.mark.parametrize("name", ["lock", ".clients.toml.partial"])
def test_no_link_is_followed_in_writing(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("the only copy")
    folder = tmp_path / "keys"
    public = new_pair(folder, "us")
    (folder / name).symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        allow_list.allow(folder, public, "noon")
    assert victim.read_text() == "the only copy"
