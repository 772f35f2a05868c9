"""The opening of a run's folder by the broker that will serve it: a new run's, or one that goes on where it ended.

    begin     settings, manifest, the base model's blocks as version 0, and then the journal, which makes it a run
    resume    lock, journal, settings that agree, then the newest intact version of each block

What a resumed broker needs is all in the folder, so that it imports neither torch nor transformers, and needs no base
model. Four things may be otherwise than the journal says, and are put right here, loudly:

    a version of the next round is there, intact    its broker was killed between the two writes: the round is committed
    such a version is damaged                       nobody was ever told of it: it is set aside
    rows are missing that were committed            their rounds are spent: nobody is told twice of one round
    a version that the journal tells of is damaged  the block goes back to the newest intact one, under a new version
                                                    number: the next round is spent on it (`Entry.attempt` 0), so that a
                                                    version number never means two contents. A run in which no round
                                                    would be left after that does not go on
"""

from __future__ import annotations

import json
import os
import platform
import secrets
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.blocks import BaseModel
from parablock import config as settings
from parablock.belonging import Belonging
from parablock.block_file import BLOCK, BlockFileError, Label, StoredBlock, file_name
from parablock.budget import plan
from parablock.invite import Invite
from parablock.journal import Journal
from parablock.journal_rows import Facts, Incarnation, JournalError, Row, entry_from_json, entry_json
from parablock.ledger import Ledger
from parablock.network import on_this_machine
from parablock.placement import write_text
from parablock.run_folder import CONFIG, ENDPOINT, INVITE, JOURNAL, RunFolder, RunFolderError
from parablock.saved import EVERYBODY, recent, spent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parablock.config import Config
    from parablock.saved import Saved


_REPAIR = "repair:"
"""What the reason of a round begins with that is spent on one."""


@dataclass(frozen=True)
class Opened:
    """A run that is ready to be served. base: its blocks as they are now. stored: the same with the server's state.

    rows: of metrics.jsonl. ended: the newest time in events.jsonl, in seconds. said: what was put right.
    """

    config: Config
    folder: RunFolder
    journal: Journal
    base: BaseModel
    stored: list[StoredBlock]
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def resumed(self) -> bool:
        """Whether another broker has served the run before."""
        return bool(self.journal.incarnations)

    @property
    def saved(self) -> Saved | None:
        """What the brokers before have left; None where they have committed nothing."""
        saved = self.journal.saved({block: self.stored[block].values.data.cast("B") for block in self.journal.newest})
        if saved is None or not self.config.privacy.private:
            return saved
        ledger, entries = Ledger(self.config.privacy), list(self.journal.entries())
        for entry in entries:
            ledger.take(entry.round, entry.charged)
        there = recent(entries, self.config.in_flight)
        return replace(saved, recent=there, charged=ledger.rounds, untold=ledger.untold)

    def began(self, now: float) -> float:
        """The moment from which the times of the run's record count, on the monotonic clock that says `now`.

        In the same boot of the same machine it is what it was; else the record goes on where it ended.
        """
        lives, boot = self.journal.incarnations, boot_id()
        if lives and boot:
            newest = lives[max(lives)]
            if newest.boot == boot and newest.clock + self.ended <= now:
                return newest.clock
        return now - self.ended

    def begin_epoch(self, began: float) -> int:
        """Make durable that this broker serves the run; its epoch. Raises OSError where the disk refuses."""
        config = json.dumps(settings.to_dict(self.config))
        return self.journal.begin_epoch(Incarnation(config, utc_now(), os.getpid(), platform.node(), boot_id(), began))

    def write_endpoint(self, endpoint: str, key: str | None) -> None:
        """Say where the broker listens, and how it is known there: an invite for workers, by its public key, Z85. None:
        it is unencrypted. Raises OSError where the disk refuses."""
        invite = self.folder.path / INVITE
        if key is None:
            invite.unlink(missing_ok=True)
        else:
            here = on_this_machine(endpoint)
            note = "For this machine; others need one with its address: parablock invite" if here != endpoint else ""
            Invite(here, key, self.journal.facts.run).write(invite, note)
        write_text(self.folder.path / ENDPOINT, endpoint + "\n", synced=False)

    def close(self) -> None:
        self.journal.close()
        self.folder.close()


def begin(config: Config, out: Path, base: BaseModel) -> Opened:
    """A new run's folder. Raises RunFolderError where it cannot be made, OSError where the disk refuses; it is free for
    the next try then."""
    folder = RunFolder.create(out, config)
    try:
        folder.lock(utc_now())
        run = _run_id(folder.path)
        folder.write_manifest(base.manifest, base.weights, tokenizer=base.tokenizer, run=run)
        stored = []
        for index, values in enumerate(base.values):
            stored.append(StoredBlock(Label(index, 0, base.manifest.digest, run), {BLOCK: values}, ""))
            folder.blocks.save(stored[index].label, stored[index].tensors)
        facts = Facts(run, base.manifest.digest, base.weights, base.tokenizer, utc_now())
        return Opened(config, folder, Journal.create(folder.path / JOURNAL, facts), base, stored)
    except BaseException:
        try:
            if not (folder.path / JOURNAL).exists():
                folder.discard()
        finally:
            folder.close()
        raise


def resume(path: Path, config_path: Path | None, overrides: Sequence[str]) -> Opened:
    """The folder of a run that goes on. config_path: settings to compare with; None: the folder's own.

    overrides: KEY=VALUE, of keys in `config.MAY_CHANGE`. Raises RunFolderError, JournalError or ConfigError where it
    cannot go on, OSError where the disk refuses.
    """
    folder = RunFolder.open(path)
    folder.lock(utc_now())
    journal = None
    try:
        journal = Journal.open(folder.path / JOURNAL)
        own = folder.config()
        config = own if config_path is None and not overrides else _changed(path, config_path, overrides)
        before = journal.incarnations[max(journal.incarnations)].settings if journal.incarnations else None
        settings.check_resumed(before or settings.to_dict(own), config)
        manifest = folder.manifest()
        if manifest.digest != journal.facts.manifest:
            raise RunFolderError(
                f"{folder.path} holds the manifest of another model than its journal is about; restore the right one"
            )
        rows = folder.read_metrics()
        ended = folder.recorded_until()
        said = _adopt(folder, journal, Belonging(journal.facts.run, manifest, config))
        stored, repairs = _repaired(folder, journal, config, Belonging.to(journal, manifest, config))
        if config != own:
            folder.write_config(config)
    except BaseException:
        if journal is not None:
            journal.close()
        folder.close()
        raise
    for block in stored:
        for vector in block.tensors.values():
            vector.flags.writeable = False
    base = BaseModel(manifest, journal.facts.base, journal.facts.tokenizer, [block.values for block in stored])
    return Opened(config, folder, journal, base, stored, rows, ended, said + repairs)


def boot_id() -> str:
    """Which boot of which machine this is; "" where that cannot be told. Its monotonic clock is one and the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def utc_now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _run_id(path: Path) -> str:
    run = f"{path.resolve().name[:40]}-{secrets.token_hex(8)}"
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in run)


def _changed(path: Path, config_path: Path | None, overrides: Sequence[str]) -> Config:
    return plan(settings.load(config_path if config_path is not None else path / CONFIG, overrides)).config


def _adopt(folder: RunFolder, journal: Journal, belonging: Belonging) -> list[str]:
    """Commit what is whole in a block's file and lacks only its row; returns what was put right."""
    said: list[str] = []
    while found := [index for index, listed in folder.blocks.listed().items() if journal.next_round + 1 in listed]:
        path = folder.blocks.path(found[0], journal.next_round + 1)
        try:
            stored = folder.blocks.read(found[0], journal.next_round + 1)
            belonging.check(path, stored)
        except BlockFileError as error:
            if journal.behind:
                if journal.last is None:
                    raise _empty(journal) from error
                _lose(journal, found[0], journal.next_round + 1)
                said.append(f"the row of round {journal.next_round - 1} is lost, and its block with it")
                continue
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            said.append(
                f"{error}. No client was told of it: it is {aside.name} now, and round {journal.next_round} held again"
            )
            break
        lacking = "had lost its row" if journal.behind else "was stored and not yet told to anybody"
        journal.append(Row(entry_from_json(stored.entry), stored.label.version))
        said.append(f"round {journal.next_round - 1} {lacking}; it is committed")
    newest = max((listed[-1] for listed in folder.blocks.listed().values()), default=0)
    if newest > journal.next_round:
        raise JournalError(
            f"{journal.path} ends with round {journal.next_round - 1}, and there are blocks that round {newest - 1} "
            "made: it has lost rows, or is an old copy; `parablock verify RUN --rebuild` makes it anew from what is "
            "intact"
        )
    if journal.behind:
        first, behind = journal.next_round, journal.behind
        if journal.last is None:
            raise _empty(journal)
        while journal.behind:
            _lose(journal, journal.last.block, None)
        said.append(
            f"{journal.path} has lost the rows of rounds {first} to {first + behind - 1}, or is an old copy: clients "
            f"may have been told of them, so they are not held again. The run goes on with round {journal.next_round}"
        )
    return said


def _empty(journal: Journal) -> JournalError:
    return JournalError(
        f"{journal.path} is empty, and {journal.behind} rounds were committed; restore it from a backup, or begin the "
        "run anew in another folder"
    )


def _lose(journal: Journal, block: int, version: int | None) -> None:
    """Commit the next round as one of which nothing is known but that it was held."""
    assert journal.last is not None
    reason = "lost: nothing tells of it any more"
    journal.append(Row(spent(journal.last, journal.next_round, block, reason, charged=(EVERYBODY,)), version))


def _repaired(
    folder: RunFolder, journal: Journal, config: Config, belonging: Belonging
) -> tuple[list[StoredBlock], list[str]]:
    """The newest version of each block, and what was put right where that is damaged."""
    stored: list[StoredBlock] = []
    damaged: list[tuple[StoredBlock, int, list[str]]] = []
    for block in folder.manifest().blocks:
        row = journal.newest.get(block.index)
        version = row.version if row is not None and row.version is not None else 0
        intact, wrong = folder.blocks.newest_intact(block.index, version, belonging.check)
        if intact is None:
            raise RunFolderError(
                f"no version of block {block.index} is intact up to the newest, {version}: "
                f"{'; '.join(wrong) or 'there is none'}. Restore {file_name(block.index, version)} from a backup"
            )
        stored.append(intact)
        if intact.label.version != version:
            damaged.append((intact, version, wrong or [f"{folder.blocks.path(block.index, version)} is not there"]))
    spends = len(damaged) + -(journal.next_round + len(damaged)) % config.together
    left = config.rounds - journal.next_round
    if damaged and left <= spends:
        raise RunFolderError(
            f"{'; '.join(wrong[0] for _, _, wrong in damaged)}. To go back to an older version takes {spends} of the "
            f"run's rounds, and one must be left after that to train in; {left} of {config.rounds} are left. Restore "
            "the file from a backup; or move it away, and `parablock export` takes the version before it"
        )
    said = []
    # What clients that hide from the broker have given to the rounds that are spent may have left, to the one before.
    charged = recent(journal.entries(), config.in_flight) if damaged and config.privacy.local else ()
    for intact, version, wrong in damaged:
        round = journal.next_round
        back = f"block {intact.label.index} goes back from version {version} to {intact.label.version}"
        stored[intact.label.index] = _spend(folder, journal, intact, f"{_REPAIR} {back}", charged)
        said.append(f"{'; '.join(wrong)}. {back[0].upper()}{back[1:]}, and round {round} is spent on it")
    # Rounds that are trained together begin together, also where a broker was killed among its repairs.
    while journal.last is not None and journal.last.reason.startswith(_REPAIR) and journal.next_round % config.together:
        again = journal.last.block
        reason = f"{_REPAIR} trained together with a round spent on one"
        stored[again] = _spend(folder, journal, stored[again], reason, journal.last.charged)
    return stored, said


def _spend(
    folder: RunFolder, journal: Journal, content: StoredBlock, reason: str, charged: tuple[str, ...]
) -> StoredBlock:
    """Commit the next round as one that gave a block this content, as a new version."""
    assert journal.last is not None
    round, block = journal.next_round, content.label.index
    newest = journal.newest.get(block)
    base = newest.entry.round if newest is not None else -1
    entry = spent(journal.last, round, block, reason, base, charged)
    label = Label(block, round + 1, content.label.manifest, content.label.run)
    folder.blocks.save(label, content.tensors, entry_json(entry))
    journal.append(Row(entry, label.version))
    return StoredBlock(label, content.tensors, entry_json(entry))
