"""A new journal in the place of a damaged one, from the rows that are intact and what the block files tell.

A version's file holds its round's entry, so the newest state of every block and of the run is in the files alone. What
no file tells are rounds whose versions are superseded, or in which nobody was counted: their rows are missing in the
new journal, which takes nothing from the run but their place in its history. Where such rounds were the last ones, they
are held once more.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.block_file import BlockFileError
from parablock.journal import (
    Facts,
    Incarnation,
    Journal,
    JournalError,
    Row,
    entry_from_json,
    salvage,
)
from parablock.run_folder import JOURNAL, RunFolderError

if TYPE_CHECKING:
    from parablock.run_folder import RunFolder


@dataclass(frozen=True)
class Rebuilt:
    """rows: in the new journal; from_files: of those, told by block files alone. lost: rounds without a row."""

    rows: int
    from_files: int
    lost: int
    next_round: int


def needed(folder: RunFolder) -> bool:
    """Whether the journal cannot be opened, or lacks rounds that block files tell of."""
    try:
        with Journal.open(folder.path / JOURNAL, read_only=True) as journal:
            newest = max((versions[-1] for versions in folder.blocks.listed().values()), default=0)
            return newest > journal.next_round + 1
    except JournalError:
        return True


def rebuild(folder: RunFolder, config: str, now: str, epoch: int) -> Rebuilt:
    """Keep the old journal as journal.sqlite.damaged and make a new one. The folder is locked by the caller.

    config: the run's settings as JSON. now: UTC, for people. epoch: of the new journal's first broker where the old one
    no longer tells of any; more than there can have been. Raises RunFolderError where the folder does not say which run
    it is of, OSError where the disk refuses.
    """
    path = folder.path / JOURNAL
    facts, incarnations, rows = salvage(path) if path.exists() else (None, {}, [])
    facts = facts or _facts(folder, now)
    kept = len(rows)
    rows += _told_by_files(folder, after=rows[-1].entry.round if rows else -1)
    if path.exists():
        os.replace(path, path.with_name(path.name + ".damaged"))
    with Journal.create(path, facts, rows) as journal:
        if not incarnations:
            incarnations = {epoch: Incarnation(config, now, os.getpid(), platform.node(), "", 0.0)}
        for number, incarnation in incarnations.items():
            journal.set_epoch(number, incarnation)
        return Rebuilt(len(rows), len(rows) - kept, journal.next_round - len(rows), journal.next_round)


def _facts(folder: RunFolder, now: str) -> Facts:
    said = folder.run_facts()
    if not said["run"]:
        raise RunFolderError(f"{folder.path} does not say which run it is of; restore its journal from a backup")
    return Facts(said["run"], folder.manifest().digest, said["weights"], said["tokenizer"], now)


def _told_by_files(folder: RunFolder, after: int) -> list[Row]:
    rows = {}
    for index, versions in folder.blocks.listed().items():
        for version in versions:
            if version - 1 > after:
                try:
                    stored = folder.blocks.read(index, version)
                except BlockFileError:
                    continue  # `verify` names it
                rows[version - 1] = Row(entry_from_json(stored.entry), version)
    return [rows[round] for round in sorted(rows)]
