"""Whether all of a run's folder is intact: every file that a resumed broker, an export or a report would read.

Reads only, and a live broker may be at work meanwhile. What it finds says which file it is about, what is wrong with
it and what to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock import witness
from parablock.belonging import Belonging
from parablock.block_file import BlockFileError, file_name
from parablock.folder_lock import holder
from parablock.journal import Journal
from parablock.journal_rows import JournalError
from parablock.run_folder import (
    BLOCKS,
    CONFIG,
    ENDPOINT,
    EVENTS,
    JOURNAL,
    LAUNCH,
    MANIFEST,
    METRICS,
    PARTITION,
    TRACE,
    RunFolderError,
)
from parablock.trace import TraceError, read_trace
from parablock.witness import WitnessError, place

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.run_folder import RunFolder


@dataclass(frozen=True)
class Problem:
    """file: within the run's folder. text: what is wrong, and what to do."""

    file: str
    text: str


@dataclass(frozen=True)
class Check:
    """Something that was looked at. found: in a few words, what is there and intact."""

    what: str
    found: str
    problems: tuple[Problem, ...] = ()


def verify(folder: RunFolder) -> list[Check]:
    """Every check, in the order in which one depends on the other."""
    config, config_check = _config(folder)
    manifest, manifest_check = _manifest(folder)
    journal, journal_check = _journal(folder, manifest)
    try:
        blocks = _blocks(folder, config, manifest, journal)
    finally:
        if journal is not None:
            journal.close()
    others = [_endpoint(folder), _launch(folder), _partition(folder)]
    return [config_check, manifest_check, journal_check, blocks, *_logs(folder), *others, _leftovers(folder)]


def _config(folder: RunFolder) -> tuple[Config | None, Check]:
    try:
        config = folder.config()
    except ValueError as error:
        return None, Check(CONFIG, "", (Problem(CONFIG, f"{error}; take it from a backup of the run"),))
    return config, Check(CONFIG, f"{config.mode}, {config.rounds} rounds")


def _manifest(folder: RunFolder) -> tuple[Manifest | None, Check]:
    try:
        manifest = folder.manifest()
    except RunFolderError as error:
        return None, Check(MANIFEST, "", (Problem(MANIFEST, str(error)),))
    return manifest, Check(MANIFEST, f"{len(manifest.blocks)} blocks, {manifest.numel:,} parameters")


def _journal(folder: RunFolder, manifest: Manifest | None) -> tuple[Journal | None, Check]:
    try:
        journal = Journal.open(folder.path / JOURNAL, read_only=True)
    except JournalError as error:
        return None, Check(JOURNAL, "", (Problem(JOURNAL, str(error)),))
    found = f"{journal.next_round} rounds, {len(journal.incarnations)} brokers"
    if manifest is not None and journal.facts.manifest != manifest.digest:
        text = (
            f"it is of a model of the digest {journal.facts.manifest[:16]}…, {MANIFEST} of another; restore one of them"
        )
        return journal, Check(JOURNAL, found, (Problem(JOURNAL, text),))
    problems = []
    if manifest is not None:
        facts, said = journal.facts, folder.run_facts()
        for name, own in (("run", facts.run), ("weights", facts.base), ("tokenizer", facts.tokenizer)):
            if said[name] != own:
                text = f"its {name} is {said[name]!r}, and {JOURNAL} says {own!r}; take it from a backup of the run"
                problems.append(Problem(MANIFEST, text))
    try:
        witness.read(journal.path)
    except WitnessError as error:
        problems.append(Problem(place(journal.path).name, f"{error}; a broker that goes on writes it anew"))
    if journal.behind:
        text = (
            f"it ends with round {journal.next_round - 1}, and {journal.behind} more were committed: it has lost "
            "rows, or is an old copy; restore it, or a broker that goes on spends these rounds"
        )
        problems.append(Problem(JOURNAL, text))
    if journal.epoch > max(journal.incarnations, default=0):
        text = f"it does not tell of the broker of epoch {journal.epoch}; a broker that goes on begins above it"
        problems.append(Problem(JOURNAL, text))
    return journal, Check(JOURNAL, found, tuple(problems))


def _blocks(folder: RunFolder, config: Config | None, manifest: Manifest | None, journal: Journal | None) -> Check:
    problems: list[Problem] = []
    intact: dict[int, set[int]] = {}
    belonging = Belonging.to(journal, manifest, config)
    count = 0
    for index, versions in folder.blocks.listed().items():
        for version in versions:
            name = f"{BLOCKS}/{file_name(index, version)}"
            try:
                belonging.check(folder.blocks.path(index, version), folder.blocks.read(index, version))
            except BlockFileError as error:
                if folder.blocks.path(index, version).exists():  # else a live broker has dropped it meanwhile
                    problems.append(Problem(name, str(error)))
                continue
            intact.setdefault(index, set()).add(version)
            count += 1
    if journal is not None and manifest is not None:
        problems += _missing(manifest, journal, folder.blocks.listed())
    blocks = len(intact) if manifest is None else f"{len(intact)} of {len(manifest.blocks)}"
    return Check(BLOCKS, f"{count} versions of {blocks} blocks", tuple(problems))


def _missing(manifest: Manifest, journal: Journal, listed: dict[int, list[int]]) -> list[Problem]:
    """Versions that the journal tells of and that are not there, and rounds that it does not tell of."""
    problems = []
    for block in manifest.blocks:
        row = journal.newest.get(block.index)
        version = row.version if row is not None else 0
        assert version is not None
        if all(there < version for there in listed.get(block.index, [])):  # a live broker may have made newer ones
            text = "the newest version of its block is not there; restore it, or a resumed broker goes back to an older"
            problems.append(Problem(f"{BLOCKS}/{file_name(block.index, version)}", f"{text} one"))
    newest = max((versions[-1] for versions in listed.values() if versions), default=0)
    if newest > journal.next_round + 1:
        text = f"it ends with round {journal.next_round - 1}, and {BLOCKS} holds what round {newest - 1} made; "
        problems.append(Problem(JOURNAL, f"{text}`parablock verify RUN --rebuild` makes it anew from what is intact"))
    return problems


def _logs(folder: RunFolder) -> list[Check]:
    checks = []
    for name, rows in ((METRICS, folder.read_metrics), (EVENTS, folder.read_events)):
        try:
            found = f"{len(rows())} rows"
            if name == EVENTS:
                folder.recorded_until()
            checks.append(Check(name, found))
        except RunFolderError as error:
            checks.append(Check(name, "", (Problem(name, str(error)),)))
    try:
        spans = len(read_trace(folder.trace_path)) if folder.trace_path.exists() else 0
        checks.append(Check(TRACE, f"{spans} spans"))
    except TraceError as error:
        checks.append(Check(TRACE, "", (Problem(TRACE, str(error)),)))
    return checks


def _endpoint(folder: RunFolder) -> Check:
    try:
        return Check(ENDPOINT, folder.endpoint() or "none")
    except RunFolderError as error:
        return Check(ENDPOINT, "", (Problem(ENDPOINT, str(error)),))


def _launch(folder: RunFolder) -> Check:
    path = folder.path / LAUNCH
    try:
        told = json.loads(path.read_bytes())
        workers, threads, device = told["workers"], told["threads"], told["device"]
        if not (type(workers) is type(threads) is int and min(workers, threads) > 0 and isinstance(device, str)):
            raise ValueError(f"got {told}")
    except FileNotFoundError:
        return Check(LAUNCH, "none")
    except (ValueError, KeyError, TypeError) as error:
        text = (
            f"{path} is damaged: {error!r}; it holds workers and threads, at least 1 each, and device, as in "
            '{"workers": 2, "device": "auto", "threads": 1}'
        )
        return Check(LAUNCH, "", (Problem(LAUNCH, text),))
    return Check(LAUNCH, f"{workers} workers")


def _partition(folder: RunFolder) -> Check:
    try:
        return Check(PARTITION, "none" if folder.shard_counts() is None else "rows by worker and label")
    except RunFolderError as error:
        return Check(PARTITION, "", (Problem(PARTITION, str(error)),))


def _leftovers(folder: RunFolder) -> Check:
    """No damage: whoever was killed while it wrote leaves some, and nobody reads them."""
    partial = [*folder.blocks.partial(), *folder.path.glob(".*.partial")]
    if not partial or holder(folder.path) is not None:
        return Check("unfinished files", "none")
    names = ", ".join(path.name for path in partial)
    return Check("unfinished files", f"{names}, of a killed broker; `parablock gc` removes them")
