"""The journal: what was appended is there after any death; what was changed since is found, named and not loaded."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from parablock import witness
from parablock.journal import Journal, salvage
from parablock.journal_rows import Facts, Incarnation, JournalError, Row, entry_from_json, entry_json
from parablock.saved import Entry, Saved, SavedVersion
from parablock.witness import Witness, WitnessError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FACTS = Facts("run-ä", "m" * 64, "b" * 64, "t" * 64, "2026-11-26 05:00 UTC")
LIFE = Incarnation('{"rounds": 9}', "2026-11-26 05:00 UTC", 17, "here", "boot", 12.5)


def row(round: int, block: int | None = None) -> Row:
    """Round 3 counts nobody."""
    counted = round != 3
    entry = Entry(
        round=round,
        block=round % 2 if block is None else block,
        attempt=1 if counted else 0,
        base=round - 3,
        contributors=("a", "ü") if counted else (),
        weights=(3, 4) if counted else (),
        steps=(8, 8) if counted else (),
        losses=(0.1 + round, 1e-300) if counted else (),
        moved=1 / 3,
        late=0,
        bytes_up=1 << 40,
        bytes_down=7,
        reason='all have "answered"',
        agenda={"next": round + 2, "credit": {"0": 0.1}, "drawn": [["a"]]},
        clients=("a", "ü"),
        tardy=("a",),
    )
    return Row(entry, round + 1 if counted else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.create(path, FACTS) as made:
        made.begin_epoch(LIFE)
        for round in range(6):
            made.append(row(round))
        yield made


def crashed(journal: Journal, place: Path) -> Path:
    """The files as a broker that was killed now would leave them."""
    place.mkdir()
    for path in journal.path.parent.glob("journal.sqlite*"):
        shutil.copy(path, place / path.name)
    return place / journal.path.name


def change(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def test_what_was_appended_is_there_after_a_crash(journal: Journal, tmp_path: Path) -> None:
    with Journal.open(crashed(journal, tmp_path / "crashed")) as again:
        assert again.facts == FACTS
        assert again.incarnations == {1: LIFE}
        assert list(again.rows()) == [row(round) for round in range(6)]
        assert list(again.entries()) == [row(round).entry for round in range(6)]
        assert (again.next_round, again.last) == (6, row(5).entry)
        assert again.newest == {0: row(4), 1: row(5)}
        again.append(row(6))
    assert journal.next_round == 6, "the other file is another one"


def test_each_broker_has_its_epoch(journal: Journal, path: Path) -> None:
    assert journal.begin_epoch(LIFE) == 2
    journal.close()
    with Journal.open(path) as again:
        assert again.begin_epoch(replace(LIFE, pid=18)) == 3
        assert {epoch: life.pid for epoch, life in again.incarnations.items()} == {1: 17, 2: 17, 3: 18}
        assert again.incarnations[3].settings == {"rounds": 9}


def test_an_epoch_survives_damage_of_the_log(journal: Journal, tmp_path: Path) -> None:
    assert journal.begin_epoch(LIFE) == 2
    journal.append(row(6))
    left = crashed(journal, tmp_path / "crashed")
    left.with_name("journal.sqlite.witness").unlink()
    log = left.with_name("journal.sqlite-wal")
    content = bytearray(log.read_bytes())
    content[100] ^= 1  # in its first frame, with which all of it is void
    log.write_bytes(content)
    with Journal.open(left) as again:
        assert (again.next_round, again.begin_epoch(LIFE)) == (6, 3)


def test_a_log_whose_end_is_damaged_is_found_by_the_witness(journal: Journal, tmp_path: Path) -> None:
    left = crashed(journal, tmp_path / "crashed")
    log = left.with_name("journal.sqlite-wal")
    content = bytearray(log.read_bytes())
    content[-100] ^= 1
    log.write_bytes(content)
    with Journal.open(left) as again:
        assert (again.next_round, again.behind) == (5, 1), "SQLite has dropped it in silence"


def test_an_older_copy_is_found_by_the_witness(journal: Journal, path: Path, tmp_path: Path) -> None:
    old = crashed(journal, tmp_path / "crashed")
    assert journal.begin_epoch(LIFE) == 2
    journal.append(row(6))
    journal.append(row(7))
    shutil.copy(path.with_name("journal.sqlite.witness"), old.parent)
    with Journal.open(old) as again:
        assert (again.next_round, again.behind, again.epoch) == (6, 2, 2)
        assert again.begin_epoch(LIFE) == 3
        again.append(row(6))
    with Journal.open(old) as again:
        assert (again.behind, again.epoch) == (1, 2 + 1)


def test_another_history_is_found_by_the_witness(journal: Journal, path: Path) -> None:
    journal.close()
    Witness(1, 5, "another digest").write(path)
    with pytest.raises(JournalError, match="the row of round 5 is another one than was committed"):
        Journal.open(path)
    Witness(1, 3, "").write(path)
    Journal.open(path).close()


def test_a_witness_that_cannot_be_written_undoes_no_round(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Witness, "write", refuse)
        journal.append(row(6))
    assert "cannot write what tells how far" in caplog.text
    journal.close()
    with Journal.open(path) as again:
        assert (again.next_round, again.behind) == (7, 0)


def test_a_damaged_witness_witnesses_nothing(journal: Journal, path: Path) -> None:
    journal.close()
    file = witness.place(path)
    for content in (b"", b"\xff", b"3", b"{}", file.read_bytes().replace(b'"round": 5', b'"round": 6')):
        file.write_bytes(content)
        with pytest.raises(WitnessError, match=r"journal\.sqlite\.witness is damaged"):
            witness.read(path)
        with Journal.open(path) as again:
            assert (again.next_round, again.behind, again.epoch) == (6, 0, 1)


def test_the_state_after_the_last_entry(journal: Journal) -> None:
    values = {0: b"zero", 1: b"one"}
    assert journal.saved(values) == Saved(
        6,
        (SavedVersion(0, 4, 1, ("a", "ü"), b"zero"), SavedVersion(1, 5, 2, ("a", "ü"), b"one")),
        {"next": 7, "credit": {"0": 0.1}, "drawn": [["a"]]},
        ("a", "ü"),
        ("a",),
    )


def test_the_newest_late_contribution_that_counted_is_known_of_each_client(journal: Journal, path: Path) -> None:
    for round, folded in ((6, ("a@4", "ü@0@2")), (7, ("a@5",))):
        journal.append(replace(row(round), entry=replace(row(round).entry, folded_late=folded)))
    journal.close()
    with Journal.open(path) as again:
        saved = again.saved({0: b"zero", 1: b"one"})
    assert saved is not None
    assert saved.folded_late == {"a": (5, 7), "ü@0": (2, 6)}


def test_a_run_without_a_round_has_no_state(path: Path) -> None:
    with Journal.create(path, FACTS) as journal:
        assert journal.saved({}) is None
        assert (journal.next_round, journal.last, journal.newest) == (0, None, {})


def test_an_entry_is_read_back_as_it_was() -> None:
    entry = row(4).entry
    assert entry_from_json(entry_json(entry)) == entry


def test_rounds_are_appended_in_order(journal: Journal) -> None:
    with pytest.raises(AssertionError, match="round 5 after round 5"):
        journal.append(row(5))


@pytest.mark.parametrize(
    ("statement", "round", "intact"),
    [
        ("UPDATE entries SET entry = replace(entry, '0.1', '0.2') WHERE round = 2", 2, 2),
        ("UPDATE entries SET version = 9 WHERE round = 4", 4, 4),
        ("UPDATE entries SET version = NULL WHERE round = 0", 0, 0),
        ("UPDATE entries SET digest = substr(digest, 2) || 'x' WHERE round = 5", 5, 5),
        ("UPDATE entries SET entry = CAST(x'ff' || substr(entry, 2) AS BLOB) WHERE round = 1", 1, 1),
        ("UPDATE entries SET round = 77 WHERE round = 4", 5, 4),
        ("DELETE FROM entries WHERE round = 2", 3, 2),
        ("DELETE FROM entries WHERE round = 0", 1, 0),
    ],
)
def test_a_row_that_was_changed_or_lost_is_named(
    journal: Journal, path: Path, statement: str, round: int, intact: int
) -> None:
    journal.close()
    change(path, statement)
    named = rf"journal\.sqlite is damaged: the row of round {round} is damaged.*: its digest does not match; `parablock"
    with pytest.raises(JournalError, match=named):
        Journal.open(path)
    assert salvage(path) == (FACTS, {1: LIFE}, [row(number) for number in range(intact)])


def test_what_is_lost_before_a_row_is_told(journal: Journal, path: Path) -> None:
    journal.close()
    change(path, "DELETE FROM entries WHERE round = 2")
    with pytest.raises(JournalError, match="round 3 is damaged, or one between it and round 1's is missing"):
        Journal.open(path)


@pytest.mark.parametrize(
    ("statement", "message", "kept"),
    [
        ("UPDATE run SET facts = replace(facts, 'mmm', 'nnn')", "what it says of the run is damaged", False),
        ("DELETE FROM run", "what it says of the run is damaged", False),
        ("UPDATE incarnations SET epoch = 2", "the row of epoch 2 is damaged", True),
        ("DROP TABLE entries", "no such table: entries", True),
    ],
)
def test_other_damage_is_named_too(journal: Journal, path: Path, statement: str, message: str, kept: bool) -> None:
    journal.close()
    change(path, statement)
    with pytest.raises(JournalError, match=rf"journal\.sqlite.*: {message}.*; `parablock verify RUN --rebuild`"):
        Journal.open(path)
    assert salvage(path)[0] == (FACTS if kept else None)


def test_no_flipped_bit_loads_another_history(journal: Journal, path: Path) -> None:
    """Every 7th byte that is not zero. What is not found is in no row: free space, or what SQLite passes over."""
    journal.close()
    content, rows = path.read_bytes(), [row(round) for round in range(6)]
    found = 0
    for place in [place for place, byte in enumerate(content) if byte][::7]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            with Journal.open(path, read_only=True) as again:
                assert (again.facts, list(again.rows()), again.incarnations) == (FACTS, rows, {1: LIFE})
        except JournalError as error:
            found += 1
            assert "journal.sqlite" in str(error)  # noqa: PT017
        _, _, intact = salvage(path)
        assert intact == rows[: len(intact)]
    assert found > 100


def test_what_is_no_journal_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"there is no journal .*; the run had not begun, so begin it anew"):
        Journal.open(path)
    path.write_text("mine, and long enough to be looked at as a database\n" * 20)
    with pytest.raises(JournalError, match=r"journal\.sqlite is damaged: file is not a database"):
        Journal.open(path)
    assert salvage(path) == (None, {}, [])
    other = tmp_path / "other.sqlite"
    change(other, "CREATE TABLE t (x)")
    with pytest.raises(JournalError, match=r"other\.sqlite is no journal of parablock"):
        Journal.open(other)


@pytest.mark.parametrize(
    ("found", "message"),
    [(2, "has format 2, and this parablock knows 1; install a newer parablock"), (0, "which no parablock ever wrote")],
)
def test_another_format_is_refused(journal: Journal, path: Path, found: int, message: str) -> None:
    journal.close()
    change(path, f"PRAGMA user_version = {found}")
    with pytest.raises(JournalError, match=message):
        Journal.open(path)


def test_a_reader_changes_nothing(journal: Journal, path: Path, tmp_path: Path) -> None:
    with Journal.open(path, read_only=True) as reader:  # beside the broker that writes
        assert reader.next_round == 6
        with pytest.raises(OSError, match="readonly"):
            reader.append(row(6))
        journal.append(row(6))
        assert [entry.round for entry in reader.entries()] == list(range(7))
    left = crashed(journal, tmp_path / "crashed")
    sizes = {each.name: each.stat().st_size for each in left.parent.iterdir() if not each.name.endswith("-shm")}
    with Journal.open(left, read_only=True) as reader:
        assert reader.next_round == 7
    assert sizes.items() <= {each.name: each.stat().st_size for each in left.parent.iterdir()}.items()


def test_a_full_disk_is_told_and_the_round_may_be_tried_again(journal: Journal, path: Path) -> None:
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    big = replace(row(6), entry=replace(row(6).entry, reason="x" * 20_000))
    with pytest.raises(OSError, match="No space left on device") as caught:
        journal.append(big)
    assert (caught.value.errno, journal.next_round) == (errno.ENOSPC, 6)
    with pytest.raises(OSError, match="No space left on device"):
        journal.append(big)
    journal._connection.execute("PRAGMA max_page_count = 100000")
    journal.append(big)
    journal.close()
    with Journal.open(path) as again:
        assert list(again.rows()) == [*(row(round) for round in range(6)), big]


@pytest.mark.parametrize(
    ("statement", "number"),
    [
        ("disk I/O error", sqlite3.SQLITE_IOERR_SHMSIZE),
        ("database or disk is full", sqlite3.SQLITE_FULL),
        ("unable to open database file", sqlite3.SQLITE_CANTOPEN),
        ("database is locked", sqlite3.SQLITE_BUSY),
        ("attempt to write a readonly database", sqlite3.SQLITE_READONLY_DBMOVED),
        ("access permission denied", sqlite3.SQLITE_PERM),
    ],
)
def test_what_the_system_refuses_is_no_damage(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, number: int
) -> None:
    journal.close()
    error = sqlite3.OperationalError(statement)
    error.sqlite_errorcode = number

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sqlite3, "connect", refuse)
    for look in (Journal.open, salvage):
        with pytest.raises(OSError, match=statement):
            look(path)


def test_a_journal_that_cannot_be_opened_for_the_moment_is_not_damaged(journal: Journal, path: Path) -> None:
    """SQLite's own answer: the log's index cannot be opened, since it follows no links."""
    journal.close()
    path.with_name("journal.sqlite-wal").write_bytes(b"")
    path.with_name("journal.sqlite-shm").symlink_to(path.parent / "nowhere")
    with pytest.raises(OSError, match=r"unable to open database file.*journal\.sqlite"):
        Journal.open(path)


@pytest.mark.parametrize("name", ["journal.sqlite", "journal.sqlite-wal"])
def test_a_journal_is_never_made_over_another_or_beside_its_log(path: Path, name: str) -> None:
    path.with_name(name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} is of another journal; move it away"):
        Journal.create(path, FACTS)
    assert [each.read_text() for each in path.parent.iterdir()] == ["mine"]


def test_a_new_journal_may_lack_rows(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "new.sqlite", FACTS, [row(0), row(2), row(5)], {40: LIFE}) as new:
        assert [entry.round for entry in new.entries()] == [0, 2, 5]
        assert new.next_round == 6
        new.append(row(6))
        assert new.incarnations == {40: LIFE}
        assert new.begin_epoch(LIFE) == 41


def test_a_crash_while_it_is_made_leaves_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            Journal.create(path, FACTS)
    with pytest.raises(JournalError, match="there is no journal"):
        Journal.open(path)
    Journal.create(path, FACTS).close()
    assert [each.name for each in path.parent.iterdir()] == ["journal.sqlite"]
