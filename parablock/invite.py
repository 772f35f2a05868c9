"""The invite: the one file that a worker needs to be given. Where the broker is, which key it has, and which run.

No secret is in it. Whoever can change it on its way can send a worker to another broker, so it is worth as much as the
way it came: compare the broker's fingerprint.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock import keys
from parablock.config import toml_value
from parablock.keys import KeyFileError
from parablock.network import check_endpoint
from parablock.placement import write_text

if TYPE_CHECKING:
    from pathlib import Path

_RUN = re.compile(r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True)
class Invite:
    """broker: its public key, Z85. run: which one it serves; "": whichever it does, as it had not begun."""

    endpoint: str
    broker: str
    run: str = ""

    def write(self, path: Path, note: str = "") -> None:
        """note: a line for people. Raises OSError where the disk refuses."""
        endpoint = toml_value(self.endpoint)
        lines = ['kind = "invite"', f"endpoint = {endpoint}", f'broker = "{self.broker}"', f'run = "{self.run}"']
        about = f"# The broker's key has the fingerprint {keys.fingerprint(self.broker)}: compare it with its owner."
        notes = [about, f"# {note}"] if note else [about]
        write_text(path, "\n".join([*notes, *lines]) + "\n")

    @classmethod
    def read(cls, path: Path) -> Invite:
        """Raises KeyFileError where the file is no invite."""
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
            kind = tree.pop("kind", "")
            if kind in ("secret", "public"):
                raise KeyFileError(f"it is a {kind} key")
            if kind != "invite" or not all(isinstance(value, str) for value in tree.values()):
                raise KeyFileError("it does not say that it is one")
            invite = cls(**tree)
            check_endpoint(invite.endpoint)
            keys.raw(invite.broker)
            if not _RUN.fullmatch(invite.run):
                raise KeyFileError(f"{invite.run!r} is no run")
        except FileNotFoundError as error:
            raise KeyFileError(
                f"there is no invite {path}; the broker's owner makes one: `parablock invite`"
            ) from error
        except OSError as error:
            raise KeyFileError(f"cannot read the invite {path}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise KeyFileError(
                f"{path} is no invite: {error}; ask the broker's owner for the file that `parablock invite` writes"
            ) from error
        return invite
