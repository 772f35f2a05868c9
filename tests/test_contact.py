"""Which broker a worker goes to and with which key, as its command line has it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytest

from broker.pairs import new_pair
from parablock import keys
from parablock.invite import Invite
from parablock.keys import KeyFileError
from parablock.network import EndpointError
from workers.contact import Contact, add_arguments, contact

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with one key, beside that of a broker of his own, and an invite."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("broker", "us"):
        new_pair(tmp_path / "parablock", name)
    Invite("tcp://10.0.0.1:5557", new_pair(tmp_path / "far", "broker").key, "run-1").write(tmp_path / "invite.toml")
    return tmp_path


def asked(*arguments: str) -> Contact:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return contact(parser.parse_args([*arguments]))


def test_an_invite_and_the_only_key_are_enough(place: Path) -> None:
    found = asked("--invite", "invite.toml")
    assert (found.endpoint, found.run) == ("tcp://10.0.0.1:5557", "run-1")
    assert found.credentials is not None
    assert found.credentials.secret == keys.read_secret(place / "parablock" / "us.secret")
    assert found.credentials.public == keys.read_public(place / "parablock" / "us.public").key
    assert found.credentials.broker == keys.read_public(place / "far" / "broker.public").key
    assert asked("--invite", "invite.toml", "--broker", "tcp://10.0.0.2:1").endpoint == "tcp://10.0.0.2:1"


def test_of_several_keys_one_is_to_be_chosen(place: Path) -> None:
    new_pair(place / "parablock", "them")
    with pytest.raises(
        KeyFileError, match=r"more than one secret key; choose with --key: .*them\.secret, .*us\.secret"
    ):
        asked("--invite", "invite.toml")
    chosen = asked("--invite", "invite.toml", "--key", str(place / "parablock" / "them.secret"))
    assert chosen.credentials is not None
    assert chosen.credentials.secret.name == "them"


@pytest.mark.usefixtures("place")
def test_plain_tcp_is_asked_for_and_stays_on_this_machine() -> None:
    assert asked("--allow-plain-tcp", "--broker", "tcp://127.0.0.1:1") == Contact("tcp://127.0.0.1:1")
    with pytest.raises(EndpointError, match="beyond this machine, where nothing goes unencrypted"):
        asked("--allow-plain-tcp", "--broker", "tcp://10.0.0.1:1")
    with pytest.raises(EndpointError, match="--invite is missing"):
        asked("--broker", "tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "--invite is missing"),
        ("--allow-plain-tcp", "wants a --broker"),
        ("--allow-plain-tcp --broker tcp://127.0.0.1:1 --invite invite.toml", "leave it or --invite out"),
        ("--allow-plain-tcp --broker tcp://127.0.0.1:1 --key parablock/us.secret", "leave it or --key out"),
        ("--allow-plain-tcp --broker tcp://127.0.0.1:1 --keys parablock", "is without keys"),
        ("--invite none.toml", "there is no invite none.toml"),
        ("--invite parablock/us.secret", "is no invite: it is a secret key"),
        ("--invite invite.toml --broker nowhere", "an endpoint is tcp://HOST:PORT"),
        ("--invite invite.toml --key parablock/us.public", "holds a public key, and here a secret key is needed"),
        (
            "--invite invite.toml --keys far",
            "there is no secret key in far; make a pair with `parablock keys new NAME`",
        ),
    ],
)
def test_what_cannot_be_is_told(place: Path, arguments: str, complaint: str) -> None:
    assert (place / "invite.toml").exists()
    with pytest.raises((KeyFileError, EndpointError)) as caught:
        asked(*arguments.split())
    assert complaint in str(caught.value)


def test_a_key_that_others_may_read_is_not_used(place: Path) -> None:
    (place / "parablock" / "us.secret").chmod(0o644)
    with pytest.raises(KeyFileError, match=r"may be read or changed by others \(mode 0644\)"):
        asked("--invite", "invite.toml")
