"""What stands in the journal: facts of the run, its brokers, a row a committed round; as text, with digests.

Each row has a digest over itself and the digest before it (XXH3-128, against damage and not against forgery). Reading
verifies them; what is done about a row that does not match is `parablock.journal`'s business.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import xxhash

from parablock.saved import Entry

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

TABLES = (
    "CREATE TABLE run (facts TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE incarnations (epoch INTEGER PRIMARY KEY, facts TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE entries (round INTEGER PRIMARY KEY, version INTEGER, entry TEXT NOT NULL, digest TEXT NOT NULL)",
)


class JournalError(ValueError):
    """The journal cannot be used. The message names the file, the row where it is one, and what to do."""


@dataclass(frozen=True)
class Facts:
    """What a run is. manifest, base, tokenizer: the digests that workers must show. begun: UTC, for people."""

    run: str
    manifest: str
    base: str
    tokenizer: str
    begun: str


@dataclass(frozen=True)
class Incarnation:
    """One life of the broker. config: its settings as JSON. begun: UTC, pid and host are for people.

    boot, clock: the machine's boot, and on that boot's monotonic clock, in seconds, the moment from which the times of
    the run's record count; by it the record goes on in a later incarnation.
    """

    config: str
    begun: str
    pid: int
    host: str
    boot: str
    clock: float

    @property
    def settings(self) -> dict[str, Any]:
        """`config` as nested dictionaries."""
        tree: dict[str, Any] = json.loads(self.config)
        return tree


@dataclass(frozen=True)
class Row:
    """A committed round. version: the one of its block that it made, by a fold or a repair; None: the block stayed."""

    entry: Entry
    version: int | None


def entry_json(entry: Entry) -> str:
    """An entry as the journal and the block files keep it."""
    return json.dumps(vars(entry), ensure_ascii=False, separators=(",", ":"))


def entry_from_json(text: str) -> Entry:
    """Raises ValueError, KeyError or TypeError for what is no entry."""
    tree = json.loads(text)
    younger = {field.name: field.default for field in fields(Entry) if field.default is not MISSING}  # than some runs
    values: dict[str, Any] = {field.name: (younger | tree)[field.name] for field in fields(Entry)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return Entry(**values)


def insert_facts(connection: sqlite3.Connection, facts: Facts) -> None:
    text = json.dumps(asdict(facts))
    connection.execute("INSERT INTO run VALUES (?, ?)", (text, _hash("run", text)))


def read_facts(connection: sqlite3.Connection) -> Facts:
    """Raises JournalError where they are damaged."""
    found = connection.execute("SELECT facts, digest FROM run").fetchall()
    if len(found) != 1 or _hash("run", found[0][0]) != found[0][1]:
        raise JournalError("what it says of the run is damaged")
    return Facts(**json.loads(found[0][0]))


def read_incarnations(connection: sqlite3.Connection) -> dict[int, Incarnation]:
    """By epoch. Raises JournalError for one that is damaged."""
    found = {}
    for epoch, text, digest in connection.execute("SELECT epoch, facts, digest FROM incarnations ORDER BY epoch"):
        if _hash("epoch", epoch, text) != digest:
            raise JournalError(f"the row of epoch {epoch} is damaged: its digest does not match")
        found[epoch] = Incarnation(**json.loads(text))
    return found


def origin(facts: Facts) -> str:
    """The digest on which the first row's builds."""
    return _hash("run", json.dumps(asdict(facts)))


def read_rows(connection: sqlite3.Connection, digest: str) -> Iterator[tuple[Row, str]]:
    """Every row with its digest. digest: what the first one builds on. Raises JournalError for one that is damaged."""
    before = -1
    for round, version, text, found in connection.execute(
        "SELECT round, version, entry, digest FROM entries ORDER BY round"
    ):
        if _hash(digest, round, version, text) != found:
            after = f", or one between it and round {before}'s is missing" if round != before + 1 else ""
            raise JournalError(f"the row of round {round} is damaged{after}: its digest does not match")
        yield Row(entry_from_json(text), version), found
        before, digest = round, found


def insert_epoch(connection: sqlite3.Connection, epoch: int, incarnation: Incarnation) -> None:
    text = json.dumps(asdict(incarnation))
    connection.execute("INSERT INTO incarnations VALUES (?, ?, ?)", (epoch, text, _hash("epoch", epoch, text)))


def insert(connection: sqlite3.Connection, row: Row, before: str) -> str:
    """Returns its digest. before: that of the row before it."""
    round, text = row.entry.round, entry_json(row.entry)
    digest = _hash(before, round, row.version, text)
    connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (round, row.version, text, digest))
    return digest


def _hash(*parts: object) -> str:
    digest: str = xxhash.xxh3_128_hexdigest("\0".join(map(str, parts)).encode())
    return digest
