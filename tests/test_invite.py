"""The invite that a worker needs to be given: whole and of the right kind, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import zmq

from broker.pairs import new_pair
from parablock.invite import Invite
from parablock.keys import KeyFileError, fingerprint

if TYPE_CHECKING:
    from pathlib import Path

KEY = zmq.curve_keypair()[0].decode()


def test_it_is_read_as_it_was_written_and_names_the_brokers_fingerprint(tmp_path: Path) -> None:
    for invite in (Invite("tcp://broker.example.org:5557", KEY, "run-1"), Invite("tcp://[::1]:5557", KEY)):
        invite.write(tmp_path / "invite.toml")
        assert Invite.read(tmp_path / "invite.toml") == invite
        assert fingerprint(KEY) in (tmp_path / "invite.toml").read_text()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('kind = "invite"', 'kind = "other"'), "it does not say that it is one"),
        (('kind = "invite"', ""), "it does not say that it is one"),
        (('run = "run-1"', 'run = "../up"'), "'../up' is no run"),
        (('run = "run-1"', "run = 1"), "it does not say that it is one"),
        (('run = "run-1"', 'secret = "x"'), "unexpected keyword"),
        (("tcp://", "udp://"), "an endpoint is tcp://HOST:PORT"),
        ((KEY, "short"), "a key is 40 characters"),
        (('run = "run-1"', "run ="), "Invalid value"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    path = tmp_path / "invite.toml"
    Invite("tcp://127.0.0.1:5557", KEY, "run-1").write(path)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(KeyFileError, match=r"invite\.toml is no invite: ") as caught:
        Invite.read(path)
    assert complaint in str(caught.value)


def test_a_key_file_is_no_invite(tmp_path: Path) -> None:
    new_pair(tmp_path, "us")
    with pytest.raises(KeyFileError, match=r"us\.public is no invite: it is a public key"):
        Invite.read(tmp_path / "us.public")
    with pytest.raises(KeyFileError, match="there is no invite"):
        Invite.read(tmp_path / "none.toml")
    with pytest.raises(KeyFileError, match="cannot read the invite"):
        Invite.read(tmp_path)
