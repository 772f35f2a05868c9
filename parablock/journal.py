"""The journal: every committed round of a run, durable before anybody is told of it. One SQLite file.

    run           what never changes: its id, and the digests of the model that it is about
    incarnations  each broker that has served the run: its epoch (1, 2, 3, ...), settings, time and place
    entries       one row a committed round (`parablock.saved.Entry`)

Each row has a digest over itself and the digest before it (XXH3-128, against damage and not against forgery), so that
a row that was changed, lost or moved is found when the journal is opened, and named; it is never loaded in silence.
What the rows before the damage and the block files still tell makes a new one: `parablock verify RUN --rebuild`.

SQLite's write-ahead log with synchronous=FULL: one fsync a commit, 4 ms where a rollback journal took 20 (ext4, README,
Decisions). The broker's disk thread appends; others may read meanwhile.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
from contextlib import closing, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import xxhash

from parablock import witness
from parablock.placement import replace
from parablock.saved import Entry, Saved, SavedVersion
from parablock.witness import Witness, WitnessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from parablock.wire import Buffer

log = logging.getLogger(__name__)

APPLICATION = 0x70626C6B
"""SQLite's application_id: says that the file is a journal of ours."""

FORMAT = 1
"""SQLite's user_version. There is no older one."""

_TABLES = (
    "CREATE TABLE run (facts TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE incarnations (epoch INTEGER PRIMARY KEY, facts TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE entries (round INTEGER PRIMARY KEY, version INTEGER, entry TEXT NOT NULL, digest TEXT NOT NULL)",
)
_NOBODY = ("",)
"""Made a version that no client's contribution did: one that a repair has put back. A version is somebody's."""

_BUSY_S = 60.0
_DAMAGE = (sqlite3.Error, UnicodeDecodeError)  # as sqlite3 raises the latter where it quotes what it found
_REFUSALS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""What SQLite answers where the system refuses, which says nothing of what is in the file; and what we say then."""


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


class Journal:
    """An open journal, every row of it verified. Nothing else may write to it.

    facts, incarnations (by epoch) and, after the newest row: next_round, last (its entry), by block, of those that
    some round has made anew, `newest`, and by client `folded_late`, as in `Saved`. witness: what tells how far it had
    come; None: nothing does.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, told: Witness | None) -> None:
        """Use `create` or `open`. Raises JournalError."""
        self.path = path
        self._connection = connection
        there = os.stat(path)
        self._place = there.st_dev, there.st_ino
        self.witness = told
        with _named(path):
            self.facts = _facts(connection)
            self.incarnations = _incarnations(connection)
            self.next_round = 0
            self.last: Entry | None = None
            self.newest: dict[int, Row] = {}
            self.folded_late: dict[str, tuple[int, int]] = {}
            self._digest = _origin(self.facts)
            for row, digest in _rows(connection, self._digest):
                self._take(row, digest)
                said = self.witness if self.witness is not None and row.entry.round == self.witness.round else None
                if said is not None and said.digest not in ("", digest):
                    raise JournalError(f"the row of round {said.round} is another one than was committed")

    @classmethod
    def create(
        cls, path: Path, facts: Facts, rows: Iterable[Row] = (), incarnations: Mapping[int, Incarnation] | None = None
    ) -> Journal:
        """A new journal, where none is, with these rows and incarnations (by epoch): there whole or not at all.

        Raises OSError where the disk refuses, or where one is, or a log that was left alone and would be taken for its.
        """
        for each in files(path):
            if each.exists():
                raise FileExistsError(errno.EEXIST, f"{each} is of another journal; move it away", str(each))
        temporary = path.with_name(f".{path.name}.partial")
        for each in files(temporary):
            each.unlink(missing_ok=True)
        with _refusals(temporary), closing(_connect(temporary)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("BEGIN")
            for table in _TABLES:
                connection.execute(table)
            text = json.dumps(asdict(facts))
            connection.execute("INSERT INTO run VALUES (?, ?)", (text, _hash("run", text)))
            for epoch, incarnation in (incarnations or {}).items():
                _insert_epoch(connection, epoch, incarnation)
            digest = _origin(facts)
            for row in rows:
                digest = _insert(connection, row, digest)
            connection.execute("COMMIT")
        replace(temporary, path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Journal:
        """Raises JournalError (there is none, it is damaged, or of another format or program), or OSError."""
        if not path.is_file():
            raise JournalError(
                f"there is no journal {path}; the run had not begun, so begin it anew in another folder, or the file "
                "was lost: `parablock verify --rebuild` makes it anew from the block files"
            )
        told: Witness | None = None
        with suppress(WitnessError):  # one that is damaged witnesses nothing; `parablock verify` says so
            told = witness.read(path)  # before the rows, to which a live broker may add meanwhile
        with _named(path):
            connection = _connect(path, read_only=read_only)
            try:
                _check_format(path, connection)
                return cls(path, connection, told)
            except BaseException:
                connection.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def behind(self) -> int:
        """Rounds that were committed after the newest row: the journal has lost theirs, or is an old copy."""
        return max(self.witness.round + 1 - self.next_round, 0) if self.witness is not None else 0

    @property
    def epoch(self) -> int:
        """Of the newest broker that has served the run; 0: none has."""
        return max(max(self.incarnations, default=0), self.witness.epoch if self.witness is not None else 0)

    def begin_epoch(self, incarnation: Incarnation) -> int:
        """Make durable that another broker serves the run; its epoch. Raises OSError where the disk refuses."""
        epoch = self.epoch + 1
        with self._transaction():
            _insert_epoch(self._connection, epoch, incarnation)
        self.incarnations[epoch] = incarnation
        with _refusals(self.path):  # out of the log, the end of which SQLite drops in silence where it is damaged
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._testify()
        return epoch

    def append(self, row: Row) -> None:
        """Make a committed round durable. Raises OSError where the disk refuses; then it may be tried again."""
        assert row.entry.round >= self.next_round, f"round {row.entry.round} after round {self.next_round - 1}"
        with self._transaction():
            digest = _insert(self._connection, row, self._digest)
        self._take(row, digest)
        self._testify()

    def rows(self) -> Iterator[Row]:
        """Every row, by rising round. Raises JournalError where one is damaged."""
        with _named(self.path):
            for row, _ in _rows(self._connection, _origin(self.facts)):
                yield row

    def entries(self) -> Iterator[Entry]:
        """Every committed round's entry, by rising round. Raises JournalError where one is damaged."""
        return (row.entry for row in self.rows())

    def saved(self, values: Mapping[int, Buffer]) -> Saved | None:
        """The state after the last entry; None where there is none. values: float32 bytes of each block in `newest`."""
        if self.last is None:
            return None
        versions = tuple(
            SavedVersion(block, row.entry.round, row.entry.base, row.entry.counted or _NOBODY, values[block])
            for block, row in sorted(self.newest.items())
        )
        last = self.last
        return Saved(self.next_round, versions, last.agenda, last.clients, last.tardy, dict(self.folded_late))

    def _take(self, row: Row, digest: str) -> None:
        self._digest = digest
        self.last = row.entry
        self.next_round = row.entry.round + 1
        for client, made_for in row.entry.late_parts:
            self.folded_late[client] = made_for, row.entry.round
        if row.version is not None:
            self.newest[row.entry.block] = row

    def _testify(self) -> None:
        round, digest = self.next_round - 1, self._digest if self.last is not None else ""
        if self.witness is not None and self.behind:  # what was committed stays so until its rounds are spent
            round, digest = self.witness.round, ""
        self.witness = Witness(self.epoch, round, digest)
        try:
            self.witness.write(self.path)
        except OSError as error:  # the row is durable: the round is committed, and may not be tried again
            log.warning("cannot write what tells how far %s has come: %s", self.path, error)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._check_place()
        with _refusals(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        """SQLite goes on with a file that has no name any more, and what it writes there is gone with the process."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != self._place:
            raise OSError(errno.ENOENT, "The journal was removed, or replaced, while it was written", str(self.path))


def salvage(path: Path) -> tuple[Facts | None, dict[int, Incarnation], list[Row]]:
    """What a damaged journal still tells: its facts, its incarnations, and the rows before the first damaged one.

    Raises OSError where the system refuses: that is no damage.
    """
    facts: Facts | None = None
    incarnations: dict[int, Incarnation] = {}
    rows: list[Row] = []
    with suppress(JournalError), _named(path), closing(_connect(path, read_only=True)) as connection:
        facts = _facts(connection)
        with suppress(JournalError), _named(path):
            incarnations = _incarnations(connection)
        for row, _ in _rows(connection, _origin(facts)):
            rows.append(row)  # those before an error count
    return facts, incarnations, rows


def files(path: Path) -> tuple[Path, Path, Path]:
    """A journal, and what SQLite may keep beside it: its log, in which rows may be, and that log's index."""
    return path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


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


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    # The disk's thread appends, whichever thread has opened it. Transactions are begun and ended here, not by sqlite3.
    place = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    if read_only and not path.with_name(path.name + "-wal").exists():  # nobody writes: nothing need be written to read
        place += "&immutable=1"
    connection = sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
    try:
        connection.execute("PRAGMA synchronous = FULL")
    except _DAMAGE:
        connection.close()
        raise
    return connection


def _check_format(path: Path, connection: sqlite3.Connection) -> None:
    (application,), (found,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if application != APPLICATION:
        raise JournalError(f"{path} is no journal of parablock, or its first page is damaged; {_REBUILD}")
    if found > FORMAT:
        raise JournalError(
            f"{path} has format {found}, and this parablock knows {FORMAT}; install a newer parablock to go on with it"
        )
    if found < FORMAT:
        raise JournalError(f"{path} has format {found}, which no parablock ever wrote; {_REBUILD}")


_REBUILD = "`parablock verify RUN --rebuild` makes it anew from what is intact"


def _facts(connection: sqlite3.Connection) -> Facts:
    found = connection.execute("SELECT facts, digest FROM run").fetchall()
    if len(found) != 1 or _hash("run", found[0][0]) != found[0][1]:
        raise JournalError("what it says of the run is damaged")
    return Facts(**json.loads(found[0][0]))


def _incarnations(connection: sqlite3.Connection) -> dict[int, Incarnation]:
    found = {}
    for epoch, text, digest in connection.execute("SELECT epoch, facts, digest FROM incarnations ORDER BY epoch"):
        if _hash("epoch", epoch, text) != digest:
            raise JournalError(f"the row of epoch {epoch} is damaged: its digest does not match")
        found[epoch] = Incarnation(**json.loads(text))
    return found


def _origin(facts: Facts) -> str:
    return _hash("run", json.dumps(asdict(facts)))


def _rows(connection: sqlite3.Connection, digest: str) -> Iterator[tuple[Row, str]]:
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


def _insert_epoch(connection: sqlite3.Connection, epoch: int, incarnation: Incarnation) -> None:
    text = json.dumps(asdict(incarnation))
    connection.execute("INSERT INTO incarnations VALUES (?, ?, ?)", (epoch, text, _hash("epoch", epoch, text)))


def _insert(connection: sqlite3.Connection, row: Row, before: str) -> str:
    round, text = row.entry.round, entry_json(row.entry)
    digest = _hash(before, round, row.version, text)
    connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (round, row.version, text, digest))
    return digest


def _hash(*parts: object) -> str:
    digest: str = xxhash.xxh3_128_hexdigest("\0".join(map(str, parts)).encode())
    return digest


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Damage becomes a JournalError that names the file and says what to do; what the system refuses an OSError."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, sqlite3.Error) and _primary(error) in _REFUSALS:
            raise _refusal(path, error) from error
        raise JournalError(f"{path} is damaged: {error}; {_REBUILD}") from error
    except JournalError as error:
        if str(path) in str(error):
            raise
        raise JournalError(f"{path} is damaged: {error}; {_REBUILD}") from error


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What SQLite says where it cannot write becomes an OSError."""
    try:
        yield
    except sqlite3.Error as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: sqlite3.Error) -> OSError:
    number = _REFUSALS.get(_primary(error), errno.EIO)
    return OSError(number, f"{os.strerror(number)} ({error})", str(path))


def _primary(error: sqlite3.Error) -> int:
    """SQLite's result code, without what extends it; −1 for an error of Python's own."""
    code: int = getattr(error, "sqlite_errorcode", -1)
    return code & 0xFF if code >= 0 else code
