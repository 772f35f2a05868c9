"""`parablock keys`: make key pairs, say who may take part, and see who does. A broker that serves follows the list.

parablock keys new NAME           a pair: NAME.secret, which never leaves its owner, and NAME.public
parablock keys allow FILE.public  on the broker's side: let this client in
parablock keys revoke NAME        no more: a session that it has ends within a second or two
parablock keys list               who is let in
parablock keys fingerprint X      of a key file, an own key or a client's: to be compared by telephone
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from broker.pairs import new_pair, public_of
from parablock import allow_list, keys
from parablock.allow_list import FILE, AllowList
from parablock.keys import KeyFileError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_DONE, EXIT_INPUT, EXIT_LATER = 0, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 2 where the input is wrong; 75 where the disk refuses."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.keys or keys.folder_of_user()
    try:
        _COMMANDS[arguments.command](arguments, folder)
    except KeyFileError as error:
        print(f"parablock keys: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"parablock keys: the disk refuses {folder}: {error.strerror or error}", file=sys.stderr)
        return EXIT_LATER
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--keys", type=Path, metavar="DIR", help="the keys folder (default: $XDG_CONFIG_HOME or ~/.config, /parablock)"
    )
    parser = argparse.ArgumentParser(
        prog="parablock keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", parents=[shared], help="make a pair of keys")
    new.add_argument("name", metavar="NAME", help=f"whose it is; {keys.BROKER} for a broker's")
    allow = commands.add_parser("allow", parents=[shared], help="let a client in")
    allow.add_argument("file", metavar="FILE.public", type=Path, help="its public key")
    allow.add_argument("--name", default="", help="what it is called in runs (default: as its key file says)")
    revoke = commands.add_parser("revoke", parents=[shared], help="let a client in no more")
    revoke.add_argument("name", metavar="NAME", help="as `parablock keys list` calls it")
    commands.add_parser("list", parents=[shared], help="who is let in")
    fingerprint = commands.add_parser("fingerprint", parents=[shared], help="of a key, to be compared by people")
    fingerprint.add_argument(
        "of",
        metavar="FILE-OR-NAME",
        help="a key file; or the name of a key in the keys folder, as `broker`, or of a client on the list, or of both",
    )
    return parser


def _new(arguments: argparse.Namespace, folder: Path) -> None:
    public = new_pair(folder, arguments.name)
    print(f"{folder / (public.name + keys.SECRET)} is secret: it stays here, and is read by nobody but you")
    if public.name == keys.BROKER:
        print("the broker's key goes to clients in an invite: parablock invite --endpoint tcp://HOST:PORT")
    else:
        print(f"{folder / (public.name + keys.PUBLIC)} is for the broker's owner: parablock keys allow FILE.public")
    print(f"fingerprint {public.fingerprint}")


def _allow(arguments: argparse.Namespace, folder: Path) -> None:
    public, own = keys.read_public(arguments.file), folder / f"{keys.BROKER}{keys.SECRET}"
    if own.exists() and public_of(own).key == public.key:
        raise KeyFileError(f"{arguments.file} is the broker's own public key; a client makes a pair of its own")
    client = allow_list.allow(folder, public, _now(), arguments.name)
    print(f"{client.name} is let in, with the key {client.fingerprint}: compare that with its owner, by telephone say")


def _revoke(arguments: argparse.Namespace, folder: Path) -> None:
    client = allow_list.revoke(folder, arguments.name, _now())
    print(f"{client.name} is let in no more (its key was {client.fingerprint})")


def _list(_arguments: argparse.Namespace, folder: Path) -> None:
    clients = AllowList.read(folder).clients
    if not clients:
        print(f"nobody is let in: {folder / FILE} is empty; parablock keys allow FILE.public")
    width = max((len(client.name) for client in clients), default=0)
    for client in clients:
        print(f"{client.name:{width}}  {client.fingerprint}  since {client.since}")


def _fingerprint(arguments: argparse.Namespace, folder: Path) -> None:
    path = Path(arguments.of)
    if path.suffix in (keys.SECRET, keys.PUBLIC) or path.is_file():
        print(public_of(path).fingerprint)
        return
    own = folder / f"{arguments.of}{keys.SECRET}"
    found = [f"{public_of(own).fingerprint}  own key, {own}"] if own.exists() else []
    clients = AllowList.read(folder).clients
    found += [f"{client.fingerprint}  client on the list" for client in clients if client.name == arguments.of]
    if not found:
        there = ", ".join(client.name for client in clients) or "nobody"
        raise KeyFileError(
            f"{arguments.of} is no file, no key in {folder}, and no client on the list there; on it is: {there}"
        )
    print("\n".join(found))


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


_COMMANDS = {"new": _new, "allow": _allow, "revoke": _revoke, "list": _list, "fingerprint": _fingerprint}


if __name__ == "__main__":
    sys.exit(main())
