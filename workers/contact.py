"""Which broker a command goes to, and who it is there: what `--invite`, `--key`, `--keys` and `--broker` come to.

Unencrypted only where `--allow-plain-tcp` says so, and then only on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parablock import keys
from parablock.invite import Invite
from parablock.keys import KeyFileError, SecretKey
from parablock.network import EndpointError, check_endpoint
from workers.socket import Credentials

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class Contact:
    """credentials: None: unencrypted. run: the only one that is meant; "": whichever the broker serves."""

    endpoint: str
    credentials: Credentials | None = None
    run: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--invite", type=Path, metavar="FILE", help="what the broker's owner gave you: where it is, and its public key")
    add("--key", type=Path, metavar="FILE", help="your secret key (default: the only one in the keys folder)")
    add("--keys", type=Path, metavar="DIR", help="the keys folder (default: $XDG_CONFIG_HOME or ~/.config, /parablock)")
    add(
        "--broker",
        metavar="ENDPOINT",
        help="where the broker listens, if elsewhere than the invite says: tcp://HOST:PORT",
    )
    add(
        "--allow-plain-tcp", action="store_true", help="connect unencrypted, to a --broker on this machine that does so"
    )


def contact(arguments: argparse.Namespace) -> Contact:
    """Raises KeyFileError and EndpointError."""
    if arguments.allow_plain_tcp:
        named = [f"--{name}" for name in ("invite", "key", "keys") if getattr(arguments, name) is not None]
        if named:
            raise EndpointError(
                f"--allow-plain-tcp is without keys and without an invite: leave it or {', '.join(named)} out"
            )
        if arguments.broker is None:
            raise EndpointError("--allow-plain-tcp wants a --broker tcp://127.0.0.1:PORT")
        check_endpoint(arguments.broker, plain=True)
        return Contact(arguments.broker)
    if arguments.invite is None:
        raise EndpointError(
            "--invite is missing: the file that the broker's owner made for you with `parablock invite`, or, on the "
            "same machine, invite.toml in the run's folder"
        )
    invite = Invite.read(arguments.invite)
    if arguments.broker is not None:
        check_endpoint(arguments.broker)
    secret = keys.read_secret(arguments.key) if arguments.key is not None else _only(arguments.keys)
    return Contact(arguments.broker or invite.endpoint, Credentials(secret, invite.broker), invite.run)


def _only(folder: Path | None) -> SecretKey:
    """The client's secret key in a keys folder. Raises KeyFileError where there is none, or more than one."""
    folder = folder or keys.folder_of_user()
    found = [path for path in sorted(folder.glob(f"*{keys.SECRET}")) if path.stem != keys.BROKER]
    if not found:
        raise KeyFileError(
            f"there is no secret key in {folder}; make a pair with `parablock keys new NAME`, and give NAME.public to "
            "the broker's owner"
        )
    if len(found) > 1:
        raise KeyFileError(f"there is more than one secret key; choose with --key: {', '.join(map(str, found))}")
    return keys.read_secret(found[0])
