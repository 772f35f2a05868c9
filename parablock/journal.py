"""The journal: every committed round of a run, durable before anybody is told of it. One SQLite file.

    run           what never changes: its id, and the digests of the model that it is about
    incarnations  each broker that has served the run: its epoch (1, 2, 3, ...), settings, time and place
    entries       one row a committed round (`parablock.saved.Entry`)

Each row has a digest over itself and the digest before it (`parablock.journal_rows`), so that a row that was changed,
lost or moved is found when the journal is opened, and named; it is never loaded in silence.
What the rows before the damage and the block files still tell makes a new one: `parablock verify RUN --rebuild`.

SQLite's write-ahead log with synchronous=FULL: one fsync a commit, 4 ms where a rollback journal took 20 (ext4, README,
Decisions). The broker's disk thread appends; others may read meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Self

from parablock import witness
from parablock.database import DAMAGE, connect, refusal, refusals, refuses
from parablock.journal_rows import (
    TABLES,
    Facts,
    Incarnation,
    JournalError,
    Row,
    insert,
    insert_epoch,
    insert_facts,
    origin,
    read_facts,
    read_incarnations,
    read_rows,
)
from parablock.placement import replace
from parablock.saved import Saved, SavedVersion
from parablock.witness import Witness, WitnessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from parablock.saved import Entry
    from parablock.wire import Buffer

log = logging.getLogger(__name__)

APPLICATION = 0x70626C6B
"""SQLite's application_id: says that the file is a journal of ours."""

FORMAT = 1
"""SQLite's user_version. There is no older one."""

_NOBODY = ("",)
"""Made a version that no client's contribution did: one that a repair has put back. A version is somebody's.

A client that has been the only one takes it for another's, and learns its α from then on: where the server averages it
is 1 but for rounding, so that what it goes on with is no longer bit for bit what serial training would. To say that it
was its own would tell it that its contribution to the round that the repair has spent had counted.
"""

_REBUILD = "`parablock verify RUN --rebuild` makes it anew from what is intact"


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
            self.facts = read_facts(connection)
            self.incarnations = read_incarnations(connection)
            self.next_round = 0
            self.last: Entry | None = None
            self.newest: dict[int, Row] = {}
            self.folded_late: dict[str, tuple[int, int]] = {}
            self._digest = origin(self.facts)
            for row, digest in read_rows(connection, self._digest):
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
        with refusals(temporary), closing(connect(temporary)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("BEGIN")
            for table in TABLES:
                connection.execute(table)
            insert_facts(connection, facts)
            for epoch, incarnation in (incarnations or {}).items():
                insert_epoch(connection, epoch, incarnation)
            digest = origin(facts)
            for row in rows:
                digest = insert(connection, row, digest)
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
            connection = connect(path, read_only=read_only)
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
            insert_epoch(self._connection, epoch, incarnation)
        self.incarnations[epoch] = incarnation
        with refusals(self.path):  # out of the log, the end of which SQLite drops in silence where it is damaged
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._testify()
        return epoch

    def append(self, row: Row) -> None:
        """Make a committed round durable. Raises OSError where the disk refuses; then it may be tried again."""
        assert row.entry.round >= self.next_round, f"round {row.entry.round} after round {self.next_round - 1}"
        with self._transaction():
            digest = insert(self._connection, row, self._digest)
        self._take(row, digest)
        self._testify()

    def rows(self) -> Iterator[Row]:
        """Every row, by rising round. Raises JournalError where one is damaged."""
        with _named(self.path):
            for row, _ in read_rows(self._connection, origin(self.facts)):
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
        with refusals(self.path):
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
    with suppress(JournalError), _named(path), closing(connect(path, read_only=True)) as connection:
        facts = read_facts(connection)
        with suppress(JournalError), _named(path):
            incarnations = read_incarnations(connection)
        for row, _ in read_rows(connection, origin(facts)):
            rows.append(row)  # those before an error count
    return facts, incarnations, rows


def files(path: Path) -> tuple[Path, Path, Path]:
    """A journal, and what SQLite may keep beside it: its log, in which rows may be, and that log's index."""
    return path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


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


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Damage becomes a JournalError that names the file and says what to do; what the system refuses an OSError."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, sqlite3.Error) and refuses(error):
            raise refusal(path, error) from error
        raise JournalError(f"{path} is damaged: {error}; {_REBUILD}") from error
    except JournalError as error:
        if str(path) in str(error):
            raise
        raise JournalError(f"{path} is damaged: {error}; {_REBUILD}") from error
