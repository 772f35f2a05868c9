"""A new journal in the place of a damaged one, from the rows that are intact and what the block files tell.

A version's file holds its round's entry, so the newest state of every block and of the run is in the files alone. What
no file tells are rounds whose versions are superseded, or in which nobody was counted: their rows are missing in the
new journal, which takes nothing from the run but their place in its history. Where such rounds were the last ones, they
are held once more. A damaged file tells by its name that its round was held, and its version number spent: that round
gets a row which says so, and the broker that goes on repairs the block as it always does (`broker.opening`).
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from parablock import witness
from parablock.belonging import Belonging
from parablock.block_file import BlockFileError
from parablock.journal import Journal, files, salvage
from parablock.journal_rows import Facts, Incarnation, JournalError, Row, entry_from_json
from parablock.placement import replace
from parablock.run_folder import JOURNAL, RunFolderError
from parablock.saved import EVERYBODY, spent
from parablock.witness import Witness, WitnessError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from parablock.run_folder import RunFolder


@dataclass(frozen=True)
class Rebuilt:
    """rows: in the new journal. lost: rounds without one. kept_as: the old journal's new name; "": there was none."""

    rows: int
    lost: int
    next_round: int
    kept_as: str


def needed(folder: RunFolder) -> bool:
    """Whether the journal cannot be opened, or lacks rounds that block files tell of."""
    try:
        with Journal.open(folder.path / JOURNAL, read_only=True) as journal:
            newest = max((versions[-1] for versions in folder.blocks.listed().values()), default=0)
            return newest > journal.next_round + 1
    except JournalError:
        return True


def rebuild(folder: RunFolder, config: str, now: str, epoch: int) -> Rebuilt:
    """Make a new journal, and set the old one aside when that is done. The folder is locked by the caller.

    config: the run's settings as JSON. now: UTC, for people. epoch: of the new journal's first broker where the old one
    no longer tells of any; more than there can have been. Raises RunFolderError where the folder does not say which run
    it is of, OSError where the disk refuses; then the old journal is as it was, or the next call goes on.
    """
    path = folder.path / JOURNAL
    ready = path.with_name(path.name + ".rebuilt")
    if path.exists() or not ready.exists():  # else a rebuild was killed when its new journal was whole
        for each in files(ready):
            each.unlink(missing_ok=True)
        _write(ready, folder, Incarnation(config, now, os.getpid(), platform.node(), "", 0.0), epoch)
    with suppress(WitnessError):
        if (before := witness.read(path)) is not None:  # its rows may have other digests now: some may be missing
            Witness(before.epoch, before.round, "").write(path)
    kept_as = _set_aside(path)
    replace(ready, path)
    with Journal.open(path, read_only=True) as journal:
        rows = sum(1 for _ in journal.rows())
        return Rebuilt(rows, journal.next_round - rows, journal.next_round, kept_as)


def _write(ready: Path, folder: RunFolder, present: Incarnation, epoch: int) -> None:
    """Make the new journal, whole, in the file `ready`."""
    path = folder.path / JOURNAL
    facts, incarnations, rows = salvage(path) if path.exists() else (None, {}, [])
    facts = facts or _facts(folder, present.begun)
    rows += _told_by_files(folder, facts.run, rows)
    with suppress(WitnessError):
        if (told := witness.read(path)) is not None and told.epoch > max(incarnations, default=0):
            incarnations[told.epoch] = present
    Journal.create(ready, facts, rows, incarnations or {epoch: present}).close()


def _set_aside(path: Path) -> str:
    """Give a journal, with all that belongs to it, a name that is free; "": there is none."""
    there = [each for each in files(path) if each.exists()]
    for number in count(1):
        kept = path.with_name(f"{path.name}.damaged" + (f".{number}" if number > 1 else ""))
        places = {each: kept.with_name(kept.name + each.name.removeprefix(path.name)) for each in there}
        if not any(place.exists() for place in places.values()):
            break
    for each, place in places.items():  # the journal itself first: a log without it is nothing, and none is missed
        os.replace(each, place)
    return kept.name if there else ""


def _facts(folder: RunFolder, now: str) -> Facts:
    said = folder.run_facts()
    if not said["run"]:
        raise RunFolderError(f"{folder.path} does not say which run it is of; restore its journal from a backup")
    return Facts(said["run"], folder.manifest().digest, said["weights"], said["tokenizer"], now)


def _told_by_files(folder: RunFolder, run: str, before: Sequence[Row]) -> list[Row]:
    """The rows after those."""
    last = before[-1] if before else None
    rows: dict[int, Row] = {}
    damaged: dict[int, int] = {}  # the block, by round
    config, path = folder.config(), folder.blocks.path
    rounds, belonging = config.rounds, Belonging(run, folder.manifest(), config)
    for index, versions in folder.blocks.listed().items():
        for version in versions:
            if version > rounds:
                raise RunFolderError(
                    f"{path(index, version)} is named as what round {version - 1} made, and the run has "
                    f"{rounds} rounds; move it away if it is of another run"
                )
            if last is None or version - 1 > last.entry.round:
                try:
                    stored = folder.blocks.read(index, version)
                    belonging.check(path(index, version), stored)
                except BlockFileError:  # `verify` names it
                    damaged[version - 1] = index
                    continue
                if version > 0:
                    rows[version - 1] = Row(entry_from_json(stored.entry), version)
    damaged.pop(-1, None)  # the base model's, which no round made
    told = [last] if last is not None else []
    told += [rows[round] for round in sorted(rows)]
    if damaged and not told:
        raise RunFolderError(
            f"{path(*next((block, round + 1) for round, block in damaged.items()))} is damaged, and "
            "nothing else tells of any round; restore it or the journal from a backup, or begin the run anew"
        )
    for round, block in damaged.items():
        if round not in rows:
            earlier = [row.entry for row in told if row.entry.round < round]
            known = earlier[-1] if earlier else told[0].entry
            entry = spent(known, round, block, "lost: the block's file is damaged", charged=(EVERYBODY,))
            rows[round] = Row(entry, round + 1)
    return [rows[round] for round in sorted(rows)]
