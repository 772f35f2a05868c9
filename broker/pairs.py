"""Pairs of keys, which libzmq makes.

`python -m broker.pairs FOLDER CLIENT ...`: the throw-away ones of a run on one machine, the broker's and each client's,
and the list of those. `parablock run` asks for them by a process, as the core knows nothing of libzmq.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from parablock import allow_list, keys, throw_away
from parablock.keys import BROKER, KeyFileError, PublicKey, SecretKey

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_DONE, EXIT_INPUT, EXIT_LATER = 0, 2, 75


def new_pair(folder: Path, name: str) -> PublicKey:
    """Make a pair and keep it in `folder`. Raises KeyFileError."""
    keys.check_name(name)
    keys.make_folder(folder)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    found = PublicKey(name, public)
    keys.write_pair(folder, SecretKey(name, secret), found)
    return found


def public_of(path: Path) -> PublicKey:
    """The public key of a file of either kind. Raises KeyFileError."""
    if path.suffix != keys.SECRET:
        return keys.read_public(path)
    secret = keys.read_secret(path)
    return PublicKey(secret.name, zmq.curve_public(secret.key.encode()).decode())


def make_throw_away(folder: Path, clients: Sequence[str]) -> None:
    """Into a new folder. Raises KeyFileError, OSError; what is there by then is marked as ours."""
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError as error:
        raise KeyFileError(f"{folder} is there already, and there may be keys in it; move it away") from error
    throw_away.mark(folder, [BROKER, *clients])
    new_pair(folder, BROKER)
    for name in clients:
        allow_list.allow(folder, new_pair(folder, name), "the run's beginning")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 2 where the place will not do; 75 where the disk refuses."""
    folder, *clients = sys.argv[1:] if argv is None else argv
    try:
        make_throw_away(Path(folder), clients)
    except KeyFileError as error:
        print(f"parablock run: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"parablock run: the disk refuses {folder}: {error.strerror or error}", file=sys.stderr)
        return EXIT_LATER
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
