"""`parablock keys` and `parablock invite`: what people type, what they are shown, and what is refused."""

from __future__ import annotations

import errno
import shutil
from typing import TYPE_CHECKING

import pytest

from broker import invite_command, keys_command
from broker.pairs import make_throw_away, new_pair, public_of
from parablock import cli, keys
from parablock.allow_list import AllowList
from parablock.invite import Invite
from tests.test_opening import begun

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own keys folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config" / "parablock"


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert cli.main([*arguments]) == code
    captured = capsys.readouterr()
    assert (captured.out == "") == (code != 0)
    assert not code or captured.err.startswith(f"parablock {arguments[0]}: ")
    return captured.err if code else captured.out


def test_from_two_pairs_to_an_invite(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "keys", "new", "broker")
    told = said(capsys, "keys", "new", "us", "--keys", "theirs")
    public = keys.read_public(tmp_path / "theirs" / "us.public")
    assert "us.secret is secret" in told
    assert public.fingerprint in told
    assert public.fingerprint in said(capsys, "keys", "allow", "theirs/us.public", "--name", "hospital-2")
    listed = said(capsys, "keys", "list")
    assert listed.startswith(f"hospital-2  {public.fingerprint}  since 20")
    for what in ("theirs/us.public", "theirs/us.secret"):
        assert said(capsys, "keys", "fingerprint", what) == public.fingerprint + "\n"
    assert said(capsys, "keys", "fingerprint", "hospital-2") == f"{public.fingerprint}  client on the list\n"
    broker = keys.read_public(home / "broker.public")
    own = f"{broker.fingerprint}  own key, {home / 'broker.secret'}\n"
    assert said(capsys, "keys", "fingerprint", "broker") == own
    mine = new_pair(home, "hospital-2")
    both = f"{mine.fingerprint}  own key, {home / 'hospital-2.secret'}\n{public.fingerprint}  client on the list\n"
    assert said(capsys, "keys", "fingerprint", "hospital-2") == both
    assert broker.fingerprint in said(capsys, "invite", "--endpoint", "tcp://broker.example.org:5557")
    assert Invite.read(tmp_path / "invite.toml") == Invite("tcp://broker.example.org:5557", broker.key)
    secret = keys.read_secret(home / "broker.secret").key
    assert secret not in (tmp_path / "invite.toml").read_text()
    said(capsys, "keys", "revoke", "hospital-2")
    assert AllowList.read(home).clients == ()
    assert "nobody is let in" in said(capsys, "keys", "list")


def test_an_invite_to_a_run_names_it(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_pair(home, "broker")
    desk = begun(tmp_path / "run")
    run = desk.opened.journal.facts.run
    desk.opened.close()
    said(capsys, "invite", "run", "--endpoint", "tcp://10.0.0.1:5557", "--out", "mine.toml")
    assert Invite.read(tmp_path / "mine.toml").run == run
    own = new_pair(tmp_path / "run" / "keys", "broker")
    said(capsys, "invite", "run", "--endpoint", "tcp://10.0.0.1:5557", "--out", "mine.toml")
    assert Invite.read(tmp_path / "mine.toml").broker != own.key, "what lies there is somebody's, and not the run's"
    shutil.rmtree(tmp_path / "run" / "keys")
    make_throw_away(tmp_path / "run" / "keys", [])
    throw_away = public_of(tmp_path / "run" / "keys" / "broker.secret")
    said(capsys, "invite", "run", "--endpoint", "tcp://10.0.0.1:5557", "--out", "mine.toml")
    assert Invite.read(tmp_path / "mine.toml").broker == throw_away.key, "the broker of that run has this one"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("keys new ../us", "a name has 1 to 64"),
        ("keys new broker", "is there already"),
        ("keys allow none.public", "there is no key file none.public"),
        ("keys allow config/parablock/broker.secret", "holds a secret key, and here a public key is needed"),
        ("keys allow config/parablock/broker.public", "is the broker's own public key"),
        ("keys allow us.public --name broker", "broker is the broker's own name"),
        ("keys allow config/parablock/broker.public --name me", "is the broker's own public key"),
        ("invite --endpoint tcp://0.0.0.0:5557", "nowhere that workers can reach it"),
        ("invite --endpoint tcp://[::]:5557", "nowhere that workers can reach it"),
        ("invite --endpoint tcp://*:5557", "nowhere that workers can reach it"),
        ("keys allow us.public --name a/b", "a name has 1 to 64"),
        ("keys allow us.public", "there is a client us already"),
        ("keys allow us.public --name again", "is that of us already"),
        ("keys revoke them", "there is no client them"),
        ("keys fingerprint them", "no client on the list there; on it is: us"),
        ("keys list --keys us.public", "Not a directory"),
        ("invite --endpoint 10.0.0.1", "an endpoint is tcp://HOST:PORT"),
        ("invite none --endpoint tcp://10.0.0.1:1", "there is no run folder none"),
        ("invite --endpoint tcp://10.0.0.1:1 --keys none", "parablock keys new broker"),
    ],
)
def test_wrong_input_is_told(
    arguments: str, complaint: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_pair(home, "broker")
    new_pair(tmp_path / "us", "us")
    shutil.copy(tmp_path / "us" / "us.public", tmp_path)
    keys_command.main(["allow", "us.public"])
    capsys.readouterr()
    before = sorted(path for path in tmp_path.rglob("*"))
    assert complaint in said(capsys, *arguments.split(), code=2)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_disk_that_refuses_may_do_later(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new_pair(home, "broker")
    new_pair(tmp_path / "us", "us")
    shutil.copy(tmp_path / "us" / "us.public", tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("parablock.allow_list.write_text", full)
    monkeypatch.setattr("parablock.invite.write_text", full)
    assert "No space left on device" in said(capsys, "keys", "allow", "us.public", code=75)
    assert "No space left on device" in said(capsys, "invite", "--endpoint", "tcp://10.0.0.1:1", code=75)
    assert (keys_command.EXIT_LATER, invite_command.EXIT_LATER) == (75, 75)
