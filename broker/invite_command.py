"""`parablock invite [RUN] --endpoint tcp://HOST:PORT`: the one file that a worker needs to be given, without a secret.

RUN: the folder of a run that has begun, which the invite is then to, and to no other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from broker.pairs import public_of
from parablock import keys
from parablock.invite import Invite
from parablock.keys import KeyFileError
from parablock.network import EndpointError, check_endpoint, is_everywhere
from parablock.run_folder import RunFolder, RunFolderError
from parablock.throw_away import throw_away_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_DONE, EXIT_INPUT, EXIT_LATER = 0, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 2 where the input is wrong; 75 where the disk refuses."""
    parser = argparse.ArgumentParser(prog="parablock invite", description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="the run's folder, if it has begun")
    add("--endpoint", required=True, help="where workers reach the broker: tcp://HOST:PORT")
    add("--out", type=Path, default=Path("invite.toml"), metavar="FILE", help="the invite (default: invite.toml)")
    add("--keys", type=Path, metavar="DIR", help="the broker's keys folder (default: as the broker's own)")
    arguments = parser.parse_args(argv)
    try:
        check_endpoint(arguments.endpoint)
        if is_everywhere(arguments.endpoint):
            raise EndpointError(
                f"{arguments.endpoint} is where a broker may listen, and nowhere that workers can reach it: give the "
                "name or the address of its machine"
            )
        run = RunFolder.open(arguments.run).run_facts()["run"] if arguments.run is not None else ""
        own = throw_away_keys(arguments.run) if arguments.run is not None else None
        folder = arguments.keys or own or keys.folder_of_user()
        public = public_of(folder / f"{keys.BROKER}{keys.SECRET}")
        Invite(arguments.endpoint, public.key, run).write(arguments.out)
    except (EndpointError, KeyFileError, RunFolderError) as error:
        print(f"parablock invite: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"parablock invite: cannot write {arguments.out}: {error.strerror or error}", file=sys.stderr)
        return EXIT_LATER
    print(f"{arguments.out} invites to {arguments.endpoint}; the broker's key has the fingerprint {public.fingerprint}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
