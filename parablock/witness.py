"""The witness beside a journal: how far the journal had come. It finds a journal that is intact and too short.

SQLite drops the end of a damaged log without a word, and a journal from a backup is as intact as any: rounds of which
clients were told would be held again, and an epoch be handed out twice. So a small file tells of the newest row and of
the newest epoch. It is renamed into place after each commit and before anybody is told; it is not synced, since a
power cut that takes it takes no row with it. A journal that is ahead of its witness is no news; one that is behind is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import xxhash

from parablock.placement import write_text

if TYPE_CHECKING:
    from pathlib import Path


class WitnessError(ValueError):
    """The witness is damaged. The message names the file."""


@dataclass(frozen=True)
class Witness:
    """epoch: of the newest broker. round: of the newest row, −1: there is none. digest: that row's; "": not known."""

    epoch: int
    round: int
    digest: str

    def write(self, journal: Path) -> None:
        """Put it beside a journal, in the place of the one before. Raises OSError where the disk refuses."""
        tree = asdict(self)
        write_text(place(journal), json.dumps(tree | {"checksum": _checksum(tree)}) + "\n", synced=False)


def read(journal: Path) -> Witness | None:
    """What was put beside a journal; None: nothing. Raises WitnessError, and OSError where the system refuses."""
    path = place(journal)
    try:
        tree = json.loads(path.read_bytes())
        checksum = tree.pop("checksum")
        if _checksum(tree) == checksum:
            return Witness(**tree)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WitnessError(f"{path} is damaged: {error!r}") from error
    raise WitnessError(f"{path} is damaged: its checksum does not match")


def place(journal: Path) -> Path:
    return journal.with_name(journal.name + ".witness")


def _checksum(tree: dict[str, object]) -> str:
    checksum: str = xxhash.xxh3_128_hexdigest(json.dumps(tree).encode())
    return checksum
