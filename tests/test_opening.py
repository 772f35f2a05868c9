"""A run's folder after any death of its broker: what a resumed one goes on with, and what it refuses.

A broker that is killed at a moment leaves its folder as it is then: a copy taken at that moment is what it leaves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from broker import opening
from broker.blocks import BaseModel, GlobalBlocks
from broker.opening import begin, resume
from broker.store import BlockStore
from parablock import verify_command
from parablock.aggregation import Contribution
from parablock.block_file import BlockWriter
from parablock.config import ConfigError, from_dict, to_dict
from parablock.coordinator_events import Fold, Store
from parablock.folder_lock import holder
from parablock.invite import Invite
from parablock.journal import Journal
from parablock.journal_rows import JournalError
from parablock.layout import Layout
from parablock.manifest import Block, Manifest, Slot
from parablock.run_folder import RunFolder, RunFolderError
from parablock.saved import EVERYBODY, Entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from broker.opening import Opened
    from parablock.config import Config

    Vector = npt.NDArray[np.float32]

NUMEL = 300
MANIFEST = Manifest(
    tuple(Block(index, f"layer {index}", (Slot(f"p{index}", (NUMEL,), "float32", 0),)) for index in range(2)), ()
)
SETTINGS: dict[str, Any] = {
    "mode": "fedbcd",
    "rounds": 9,
    "codec": {"down": "int8"},
    "server": {"optimizer": "yogi", "lr": 0.01},
}


def vector(seed: int) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(NUMEL).astype(np.float32)
    return values


class Desk:
    """What of a broker makes rounds: the folds and the store, on an opened folder."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.round = opened.journal.next_round
        self.config = opened.config
        self.blocks = GlobalBlocks(opened.base, opened.config)
        for stored in opened.stored:
            self.blocks.restore(stored)
        run, digest, keep = opened.journal.facts.run, opened.base.manifest.digest, opened.config.journal.keep
        self.store = BlockStore(opened.folder.blocks, opened.journal, run, digest, keep)

    def hold(self, *, counted: bool = True, clients: tuple[str, ...] = ("a",), charged: tuple[str, ...] = ()) -> None:
        """One round, by one client's update, which follows from the round. clients: on the roster."""
        round, block = self.round, self.round % 2
        entry = Entry(
            round, block, int(counted), round - 2, ("a",) * counted, (1,) * counted, (8,) * counted, (0.5,) * counted,
            0.0, 0, 7, 7, "all", {"next": round + 2}, clients, (), charged=charged,
        )  # fmt: skip
        store = Store(round, block, int(counted), entry)
        tensors = None
        if counted:
            layout = Layout.up(self.config, NUMEL)
            contribution = Contribution("a", 1, 8, layout.codec.encode(vector(100 + round)))
            made = self.blocks.fold(Fold(round, block, 1, 0, (contribution,)))
            self.store.write(round, 1, block, made.numel, made.parts)  # type: ignore[union-attr]
            tensors = self.blocks.tensors(store)
        self.store.commit(store, tensors)
        if counted:
            self.blocks.settle(store)
        self.round += 1


def config_of(**changes: Any) -> Config:
    return from_dict({**SETTINGS, **changes})


def begun(path: Path, rounds: int = 0, **changes: Any) -> Desk:
    config = config_of(**changes)
    base = BaseModel(MANIFEST, "weights", "tokens", [vector(0), vector(1)])
    opened = begin(config, path, base)
    opened.begin_epoch(0.0)
    desk = Desk(opened)
    for _ in range(rounds):
        desk.hold()
    return desk


def killed(desk: Desk, place: Path) -> Path:
    """The folder as the broker leaves it that is killed now."""
    shutil.copytree(desk.opened.folder.path, place)
    return place


def state(opened: Opened) -> list[dict[str, bytes]]:
    """All that the next rounds depend on, by block."""
    return [{name: each.tobytes() for name, each in block.tensors.items()} for block in opened.stored]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, bytes]]]:
    """By number of rounds, the state after those of a run that nobody disturbs."""
    path = tmp_path_factory.mktemp("undisturbed")
    desk = begun(path / "run")
    states = []
    for round in range(7):
        with_this = resume(killed(desk, path / f"after-{round}"), None, [])
        states.append(state(with_this))
        with_this.close()
        desk.hold()
    desk.opened.close()
    return states


def test_a_new_folder_has_all_that_a_restart_needs(tmp_path: Path, undisturbed: list[list[dict[str, bytes]]]) -> None:
    opened = begin(config_of(), tmp_path / "a run of ours", BaseModel(MANIFEST, "w", "t", [vector(0), vector(1)]))
    assert not opened.resumed
    assert opened.saved is None
    assert opened.folder.blocks.listed() == {0: [0], 1: [0]}
    run = opened.journal.facts.run
    assert run.startswith("a-run-of-ours-")
    assert opened.folder.run_facts() == {"run": run, "weights": "w", "tokenizer": "t"}
    with pytest.raises(RunFolderError, match="is in use by a broker"):
        resume(tmp_path / "a run of ours", None, [])
    opened.close()
    again = resume(tmp_path / "a run of ours", None, [])
    assert (again.journal.facts.run, again.base.weights, again.base.tokenizer) == (run, "w", "t")
    assert (again.config, again.saved, again.resumed) == (config_of(), None, False)
    assert [values.tobytes() for values in again.base.values] == [vector(0).tobytes(), vector(1).tobytes()]
    assert state(again) == undisturbed[0]
    again.close()


def test_what_goes_on_is_what_would_have_gone_on(tmp_path: Path, undisturbed: list[list[dict[str, bytes]]]) -> None:
    """Killed after each round and resumed: blocks, the server optimizer's state and residuals are as if it was not."""
    desk = begun(tmp_path / "0")
    for round in range(1, 7):
        desk.hold()
        opened = resume(killed(desk, tmp_path / f"{round}"), None, [])
        desk.opened.close()
        assert state(opened) == undisturbed[round]
        assert opened.begin_epoch(0.0) == round + 1
        assert opened.resumed
        saved = opened.saved
        assert saved is not None
        assert (saved.next_round, saved.clients, saved.agenda) == (round, ("a",), {"next": round + 1})
        assert [(each.block, each.round) for each in saved.versions] == sorted(
            {number % 2: number for number in range(round)}.items()
        )
        assert all(bytes(each.values) == undisturbed[round][each.block]["block"] for each in saved.versions)
        desk = Desk(opened)
    desk.opened.close()


def test_superseded_versions_go(tmp_path: Path) -> None:
    desk = begun(tmp_path / "run", rounds=7, journal={"keep": 3})
    assert desk.opened.folder.blocks.listed() == {0: [3, 5, 7], 1: [2, 4, 6]}
    desk.opened.close()


def test_versions_that_cannot_be_dropped_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = begun(tmp_path / "run", rounds=3)
    with monkeypatch.context() as patch:
        patch.setattr(type(desk.opened.folder.blocks), "drop", refuse)
        desk.hold()
        assert "cannot drop version 0 of block 1" in caplog.text
    desk.hold()
    desk.opened.close()
    assert desk.opened.folder.blocks.listed() == {0: [3, 5], 1: [0, 2, 4]}


# Failpoints


def points() -> dict[str, tuple[Any, str, bool]]:
    """By name, the step before or after which the broker is killed: whose it is, which, and whether before."""
    steps: dict[str, tuple[Any, str]] = {
        "the block's parts": (BlockWriter, "write"),
        "the block's commit": (BlockWriter, "commit"),
        "its fsync": (os, "fsync"),
        "its rename": (os, "replace"),
        "the row": (Journal, "append"),
        "dropping": (BlockStore, "_drop_superseded"),
    }
    return {f"{when} {name}": (*step, when == "before") for name, step in steps.items() for when in ("before", "after")}


@pytest.mark.parametrize("point", points())
def test_killed_at_any_point_a_round_is_held_or_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[list[dict[str, bytes]]], point: str
) -> None:
    owner, name, before = points()[point]
    desk = begun(tmp_path / "run", rounds=4)
    step: Callable[..., Any] = getattr(owner, name)
    left: list[Path] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        if before and not left:
            left.append(killed(desk, tmp_path / "left"))
        result = step(*arguments, **more)
        if not before and not left:
            left.append(killed(desk, tmp_path / "left"))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, watched)
        desk.hold()
    desk.opened.close()
    opened = resume(left[0], None, [])
    rounds = opened.journal.next_round
    named = point in ("after the block's commit", "after its rename", "before the row", "after the row") or (
        "dropping" in point
    )
    assert rounds == (5 if named else 4), "the rename is what commits it"
    assert state(opened) == undisturbed[rounds]
    assert (opened.said != []) == (point in ("after the block's commit", "after its rename", "before the row"))
    again = Desk(opened)
    while again.round < 6:
        again.hold()
    opened.close()
    final = resume(left[0], None, [])
    assert state(final) == undisturbed[6]
    assert [entry.round for entry in final.journal.entries()] == list(range(6))
    assert not final.folder.blocks.partial() or point.endswith(("parts", "before its fsync"))
    final.close()


def test_a_round_in_which_nobody_was_counted_is_a_row(tmp_path: Path) -> None:
    desk = begun(tmp_path / "run", rounds=3)
    desk.hold(counted=False)
    listed = desk.opened.folder.blocks.listed()
    opened = resume(killed(desk, tmp_path / "left"), None, [])
    desk.opened.close()
    assert (opened.journal.next_round, opened.folder.blocks.listed()) == (4, listed)
    opened.close()


# Damage


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_damaged_version_is_gone_back_from_and_never_forgotten(
    tmp_path: Path, undisturbed: list[list[dict[str, bytes]]]
) -> None:
    begun(tmp_path / "run", rounds=5).opened.close()
    damage(tmp_path / "run" / "blocks" / "0000-000005.safetensors")
    opened = resume(tmp_path / "run", None, [])
    (said,) = opened.said
    assert "0000-000005.safetensors is damaged" in said
    assert "Block 0 goes back from version 5 to 3, and round 5 is spent on it" in said
    assert opened.journal.next_round == 6
    assert state(opened) == [undisturbed[3][0], undisturbed[5][1]]
    saved = opened.saved
    assert saved is not None
    versions = {each.block: each for each in saved.versions}
    assert (versions[0].round, versions[0].base, versions[0].counted) == (5, 4, ("",))
    assert bytes(versions[0].values) == undisturbed[3][0]["block"]
    assert opened.folder.blocks.listed()[0] == [3, 5, 6], "a number never means two contents"
    (spent,) = [entry for entry in opened.journal.entries() if entry.round == 5]
    assert (spent.attempt, spent.contributors, spent.agenda) == (0, (), {"next": 6})
    assert spent.reason.startswith("repair: block 0 goes back")
    Desk(opened).hold()
    opened.close()
    again = resume(tmp_path / "run", None, [])
    assert (again.journal.next_round, again.said) == (7, []), "once"
    again.close()


def test_another_run_s_version_is_neither_gone_on_with_nor_committed(
    tmp_path: Path, undisturbed: list[list[dict[str, bytes]]]
) -> None:
    begun(tmp_path / "run", rounds=5).opened.close()
    begun(tmp_path / "other", rounds=6).opened.close()
    for version in ("0000-000005", "0001-000006"):
        shutil.copy(tmp_path / "other" / "blocks" / f"{version}.safetensors", tmp_path / "run" / "blocks")
    opened = resume(tmp_path / "run", None, [])
    lacking, newest = opened.said
    assert "0001-000006.safetensors is intact, and does not belong here: it is of the run 'other-" in lacking
    assert "0000-000005.safetensors is intact, and does not belong here" in newest
    assert state(opened) == [undisturbed[3][0], undisturbed[5][1]]
    opened.close()


def test_a_missing_version_is_gone_back_from_too(tmp_path: Path) -> None:
    begun(tmp_path / "run", rounds=5).opened.close()
    (tmp_path / "run" / "blocks" / "0001-000004.safetensors").unlink()
    opened = resume(tmp_path / "run", None, [])
    assert "0001-000004.safetensors is not there. Block 1 goes back from version 4 to 2" in opened.said[0]
    opened.close()


@pytest.mark.parametrize("version", ["0001-000006", "0000-000007"])
def test_a_version_that_cannot_be_read_for_the_moment_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[list[dict[str, bytes]]], version: str
) -> None:
    """The newest that was announced, and one that lacks its row."""
    desk = begun(tmp_path / "run", rounds=6)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse)
        with pytest.raises(OSError, match="No space left"):
            desk.hold()
    left = killed(desk, tmp_path / "left")
    desk.opened.close()
    opened, names = type(tmp_path).open, sorted(path.name for path in (left / "blocks").iterdir())

    def too_many(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name.startswith(version):
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", too_many)
        with pytest.raises(OSError, match=rf"Too many open files while .*{version}.* was read"):
            resume(left, None, [])
        assert verify_command.main([str(left)]) == 75
    assert sorted(path.name for path in (left / "blocks").iterdir()) == names
    again = resume(left, None, [])
    assert (again.journal.next_round, state(again)[1]) == (7, undisturbed[6][1])
    assert not any("damaged" in said for said in again.said)
    again.close()


def test_rounds_that_are_trained_together_begin_together_after_a_repair(tmp_path: Path) -> None:
    config = from_dict({**SETTINGS, "mode": "lisa", "rounds": 8})
    opened = begin(config, tmp_path / "run", BaseModel(MANIFEST, "w", "t", [vector(0), vector(1)]))
    desk = Desk(opened)
    for _ in range(4):
        desk.hold()
    opened.close()
    damage(tmp_path / "run" / "blocks" / "0000-000003.safetensors")
    again = resume(tmp_path / "run", None, [])
    assert again.journal.next_round == 6
    assert state(again)[0] == {name: each.tobytes() for name, each in again.folder.blocks.read(0, 1).tensors.items()}
    again.close()


def test_a_broker_that_is_killed_among_its_repairs_leaves_them_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict({**SETTINGS, "mode": "lisa", "rounds": 8})
    opened = begin(config, tmp_path / "run", BaseModel(MANIFEST, "w", "t", [vector(0), vector(1)]))
    desk = Desk(opened)
    for _ in range(4):
        desk.hold()
    opened.close()
    damage(tmp_path / "run" / "blocks" / "0000-000003.safetensors")
    append, appended = Journal.append, []

    def kill(journal: Journal, row: Any) -> None:
        if appended:
            raise KeyboardInterrupt
        append(journal, row)
        appended.append(row)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", kill)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run", None, [])
    (tmp_path / "run" / "blocks" / "0000-000006.safetensors").unlink()  # of the other round, which has no row
    again = resume(tmp_path / "run", None, [])
    assert again.journal.next_round == 6, "rounds that are trained together begin together"
    again.close()


@pytest.mark.parametrize(
    ("rounds", "mode", "repaired"), [(7, "fedbcd", True), (8, "fedbcd", False), (6, "lisa", False)]
)
def test_a_repair_leaves_a_round_to_train_in(tmp_path: Path, rounds: int, mode: str, repaired: bool) -> None:
    """Of 9 rounds; with lisa of 8, where two are trained together."""
    config = from_dict({**SETTINGS, "mode": mode, "rounds": 9 if mode == "fedbcd" else 8})
    opened = begin(config, tmp_path / "run", BaseModel(MANIFEST, "w", "t", [vector(0), vector(1)]))
    desk = Desk(opened)
    for _ in range(rounds):
        desk.hold()
    opened.close()
    newest = (rounds - 1) // 2 * 2 + 1  # of block 0
    damage(tmp_path / "run" / "blocks" / f"0000-{newest:06d}.safetensors")
    if repaired:
        again = resume(tmp_path / "run", None, [])
        assert again.journal.next_round == rounds + 1 < config.rounds
        again.close()
        return
    with pytest.raises(
        RunFolderError, match=rf"one must be left after that .*; {config.rounds - rounds} of .* are left"
    ):
        resume(tmp_path / "run", None, [])
    with Journal.open(tmp_path / "run" / "journal.sqlite") as journal:
        assert journal.next_round == rounds, "nothing was spent"


def test_what_cannot_be_repaired_is_refused_and_named(tmp_path: Path) -> None:
    begun(tmp_path / "run", rounds=9).opened.close()
    blocks = tmp_path / "run" / "blocks"
    damage(blocks / "0000-000009.safetensors")
    with pytest.raises(
        RunFolderError, match=r"0000-000009\.safetensors is damaged.*takes 1 of the .*; 0 of 9 are left"
    ):
        resume(tmp_path / "run", None, [])
    damage(blocks / "0000-000007.safetensors")
    with pytest.raises(RunFolderError, match=r"no version of block 0 is intact .*0000-000007\.safetensors is damaged"):
        resume(tmp_path / "run", None, [])


@pytest.mark.parametrize("version", ["0000-000005", "0001-000004"])
def test_a_journal_and_a_version_that_are_lost_together_give_no_number_two_contents(
    tmp_path: Path, undisturbed: list[list[dict[str, bytes]]], version: str
) -> None:
    begun(tmp_path / "run", rounds=5).opened.close()
    (tmp_path / "run" / "journal.sqlite").unlink()
    damage(tmp_path / "run" / "blocks" / f"{version}.safetensors")
    assert verify_command.main([str(tmp_path / "run"), "--rebuild"]) == 1
    opened = resume(tmp_path / "run", None, [])
    assert [f"{version}.safetensors is damaged" in said for said in opened.said] == [True]
    assert "and round 5 is spent on it" in opened.said[0]
    assert (opened.journal.next_round, opened.journal.last.clients) == (6, ("a",))  # type: ignore[union-attr]
    block = int(version[:4])
    assert state(opened)[block] == undisturbed[3 if block == 0 else 2][block]
    assert state(opened)[1 - block] == undisturbed[5][1 - block]
    opened.close()


def test_a_round_whose_file_is_damaged_is_charged_to_everybody(tmp_path: Path) -> None:
    begun(tmp_path / "run", rounds=5).opened.close()
    (tmp_path / "run" / "journal.sqlite").unlink()
    damage(tmp_path / "run" / "blocks" / "0000-000005.safetensors")
    assert verify_command.main([str(tmp_path / "run"), "--rebuild"]) == 1
    with Journal.open(tmp_path / "run" / "journal.sqlite", read_only=True) as journal:
        assert journal.last is not None
        assert (journal.last.round, journal.last.clients, journal.last.charged) == (4, ("a",), (EVERYBODY,))


def test_where_nothing_tells_of_any_round_there_is_no_journal_to_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path / "run", rounds=1).opened.close()
    (tmp_path / "run" / "journal.sqlite").unlink()
    damage(tmp_path / "run" / "blocks" / "0000-000001.safetensors")
    assert verify_command.main([str(tmp_path / "run"), "--rebuild"]) == 2
    assert "0000-000001.safetensors is damaged, and nothing else tells of any round" in capsys.readouterr().err


def test_a_version_that_nobody_was_told_of_and_is_damaged_goes(
    tmp_path: Path, undisturbed: list[list[dict[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = begun(tmp_path / "run", rounds=4)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse)
        with pytest.raises(OSError, match="No space left"):
            desk.hold()
    left = killed(desk, tmp_path / "left")
    desk.opened.close()
    damage(left / "blocks" / "0000-000005.safetensors")
    opened = resume(left, None, [])
    assert (
        "No client was told of it: it is 0000-000005.safetensors.damaged now, and round 4 held again" in opened.said[0]
    )
    assert (opened.journal.next_round, state(opened)) == (4, undisturbed[4])
    assert opened.folder.blocks.listed()[0] == [1, 3]
    opened.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_journal_that_has_lost_its_newest_row_holds_no_round_again(
    tmp_path: Path, undisturbed: list[list[dict[str, bytes]]], damaged: bool
) -> None:
    """In which nobody was counted; or whose version is damaged as well, of which clients know."""
    desk = begun(tmp_path / "run", rounds=4)
    desk.hold(counted=damaged)
    left = killed(desk, tmp_path / "left")
    desk.opened.close()
    content = bytearray((left / "journal.sqlite-wal").read_bytes())
    content[-100] ^= 1
    (left / "journal.sqlite-wal").write_bytes(content)
    if damaged:
        damage(left / "blocks" / "0000-000005.safetensors")
    opened = resume(left, None, [])
    assert opened.journal.next_round == (6 if damaged else 5)
    assert state(opened) == undisturbed[4]
    if damaged:
        assert "the row of round 4 is lost, and its block with it" in opened.said[0]
        assert "Block 0 goes back from version 5 to 3, and round 5 is spent on it" in opened.said[1]
    else:
        assert "has lost the rows of rounds 4 to 4, or is an old copy" in opened.said[0]
    opened.close()
    again = resume(left, None, [])
    assert again.said == []
    again.close()


def test_a_round_that_is_lost_is_charged_to_everybody(tmp_path: Path) -> None:
    """Who had gone before it may have come back for it, and somebody may have come of whom no row tells."""
    private = {"where": "local", "clip": 1.0, "noise": 2.0, "budget": 8.0, "rounds": 9}
    desk = begun(tmp_path / "run", rounds=3, privacy=private, mode="parablock")
    desk.hold(clients=("a", "b"), charged=("a", "b"))
    desk.hold(counted=False, clients=("b",))
    left = killed(desk, tmp_path / "left")
    desk.opened.close()
    content = bytearray((left / "journal.sqlite-wal").read_bytes())
    content[-100] ^= 1
    (left / "journal.sqlite-wal").write_bytes(content)
    with contextlib.closing(resume(left, None, [])) as opened:
        assert "has lost the rows of rounds 4 to 4" in opened.said[0]
        assert opened.journal.last is not None
        assert (opened.journal.last.clients, opened.journal.last.charged) == (("a", "b"), (EVERYBODY,))
        saved = opened.saved
        assert saved is not None
        assert (saved.charged, saved.untold) == ({"a": 1, "b": 1}, 1)
        assert saved.recent == (EVERYBODY,), "nor who may have given to those that were open"


def test_rounds_that_a_repair_spends_are_charged_to_who_hides_from_the_broker_and_was_there(tmp_path: Path) -> None:
    """What they had given to those when the broker was killed had left."""
    for where, charged in (("local", ("a", "b")), ("central", ())):
        private = {"where": where, "clip": 1.0, "noise": 2.0, "budget": 8.0, "rounds": 9}
        desk = begun(tmp_path / where, rounds=3, privacy=private, mode="parablock")
        desk.hold(clients=("a", "b"))
        desk.hold(clients=("a",))
        desk.opened.close()
        damage(tmp_path / where / "blocks" / "0000-000005.safetensors")
        with contextlib.closing(resume(tmp_path / where, None, [])) as opened:
            assert opened.journal.last is not None
            assert (opened.journal.last.round, opened.journal.last.charged) == (5, charged)
            assert opened.saved is not None
            assert opened.saved.recent == ("a", "b")[: 1 + len(charged)]


def test_a_row_that_was_lost_is_had_from_its_block(tmp_path: Path, undisturbed: list[list[dict[str, bytes]]]) -> None:
    desk = begun(tmp_path / "run", rounds=5)
    left = killed(desk, tmp_path / "left")
    desk.opened.close()
    content = bytearray((left / "journal.sqlite-wal").read_bytes())
    content[-100] ^= 1
    (left / "journal.sqlite-wal").write_bytes(content)
    opened = resume(left, None, [])
    assert opened.said == ["round 4 had lost its row; it is committed"]
    assert (opened.journal.next_round, state(opened)) == (5, undisturbed[5])
    opened.close()


@pytest.mark.parametrize("counted", [False, True])
def test_a_journal_without_its_rows_is_refused(tmp_path: Path, counted: bool) -> None:
    desk = begun(tmp_path / "run")
    old = killed(desk, tmp_path / "old")
    desk.hold(counted=counted)
    desk.opened.close()
    shutil.copy(tmp_path / "run" / "journal.sqlite.witness", old)
    if counted:
        shutil.copy(tmp_path / "run" / "blocks" / "0000-000001.safetensors", old / "blocks")
        damage(old / "blocks" / "0000-000001.safetensors")
    with pytest.raises(JournalError, match=r"journal\.sqlite is empty, and 1 rounds were committed; restore it"):
        resume(old, None, [])


def test_a_journal_that_has_lost_rows_is_refused(tmp_path: Path) -> None:
    desk = begun(tmp_path / "run", rounds=2)
    old = killed(desk, tmp_path / "old")
    for _ in range(3):
        desk.hold()
    desk.opened.close()
    for name in ("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        if (old / name).exists():
            shutil.copy(old / name, tmp_path / "run" / name)
    (tmp_path / "run" / "blocks" / "0000-000003.safetensors").unlink()  # else its rows could be had from the files
    with pytest.raises(JournalError, match=r"ends with round 1, and there are blocks that round 4 made: it has lost"):
        resume(tmp_path / "run", None, [])
    free = RunFolder.open(tmp_path / "run")
    free.lock("noon")
    free.close()


# Disk


@pytest.mark.parametrize("where", [(BlockWriter, "write"), (BlockWriter, "commit"), (Journal, "append")])
def test_a_full_disk_commits_nothing_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[list[dict[str, bytes]]], where: tuple[Any, str]
) -> None:
    desk = begun(tmp_path / "run", rounds=4)
    commit, stores = desk.store.commit, []

    def seen(store: Store, tensors: dict[str, Vector] | None) -> None:
        stores.append((store, tensors))
        commit(store, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "commit", seen)
        patch.setattr(*where, refuse)
        with pytest.raises(OSError, match="No space left"):
            desk.hold()
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                commit(*stores[0])
    assert desk.opened.journal.next_round == 4
    commit(*stores[0])
    desk.opened.close()
    opened = resume(tmp_path / "run", None, [])
    assert (opened.journal.next_round, state(opened), opened.said) == (5, undisturbed[5], [])
    assert not opened.folder.blocks.partial()
    opened.close()


def test_a_folder_that_is_removed_is_told(tmp_path: Path) -> None:
    desk = begun(tmp_path / "run", rounds=4)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match="No such file or directory"):
        desk.hold()
    with pytest.raises(OSError, match=r"The journal was removed, or replaced, while it was written"):
        desk.hold(counted=False)
    desk.opened.close()


def test_a_folder_that_could_not_be_made_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "create", refuse)
        with pytest.raises(OSError, match="No space left"):
            begun(tmp_path / "run")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        resume(tmp_path / "run", None, [])
    assert holder(tmp_path / "run") is None
    begun(tmp_path / "run").opened.close()


# Settings


def test_a_run_goes_on_with_its_own_settings_or_with_those_that_may_change(tmp_path: Path) -> None:
    begun(tmp_path / "run", rounds=2).opened.close()
    opened = resume(tmp_path / "run", None, ["round.deadline_s=5", "journal.keep=4"])
    assert (opened.config.round.deadline_s, opened.config.journal.keep) == (5.0, 4)
    opened.begin_epoch(0.0)
    opened.close()
    opened = resume(tmp_path / "run", None, [])
    assert opened.config.round.deadline_s == 5.0, "and keeps them"
    assert opened.journal.incarnations[2].settings == to_dict(opened.config)
    opened.close()
    theirs = tmp_path / "config.toml"
    theirs.write_text('mode = "fedbcd"\nrounds = 9\ncodec.down = "int8"\nserver = {optimizer = "yogi", lr = 0.01}\n')
    opened = resume(tmp_path / "run", theirs, [])
    assert opened.config == config_of(), "the same run's settings from elsewhere"
    opened.close()


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    begun(tmp_path / "run", rounds=2).opened.close()
    with pytest.raises(ConfigError, match=r"server\.lr was 0\.01 when the run began, and would be 0\.5 now"):
        resume(tmp_path / "run", None, ["server.lr=0.5"])
    with pytest.raises(ConfigError, match='model was "builtin" when the run began, and would be "other" now'):
        resume(tmp_path / "run", None, ["model=other"])
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("rounds = 9", "rounds = 10"))
    with pytest.raises(ConfigError, match="rounds was 9 when the run began, and would be 10 now"):
        resume(tmp_path / "run", None, [])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run folder"):
        resume(tmp_path / "nowhere", None, [])
    RunFolder.create(tmp_path / "run", config_of()).close()
    with pytest.raises(JournalError, match="there is no journal"):
        resume(tmp_path / "run", None, [])
    desk = begun(tmp_path / "other")
    desk.opened.folder.write_manifest(Manifest(MANIFEST.blocks, ("head",)))
    desk.opened.close()
    with pytest.raises(RunFolderError, match="holds the manifest of another model than its journal"):
        resume(tmp_path / "other", None, [])


# Time and place


def test_times_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = begun(tmp_path / "run")
    desk.opened.begin_epoch(began=1000.0)
    desk.opened.folder.append_event({"time_s": 50.0, "kind": "joined"})
    desk.opened.close()
    opened = resume(tmp_path / "run", None, [])
    if opening.boot_id():
        assert opened.began(1060.0) == 1000.0, "the same boot: the same clock"
    assert opened.began(1040.0) == 990.0, "a clock that cannot be the same"
    monkeypatch.setattr(opening, "boot_id", lambda: "another")
    assert opened.began(7.0) == -43.0, "another boot: right after what was recorded last"
    opened.close()


def test_a_record_without_a_time_is_named(tmp_path: Path) -> None:
    desk = begun(tmp_path / "run")
    desk.opened.folder.append_event({"time_s": None, "kind": "joined"})
    desk.opened.folder.append_event({"kind": "joined"})
    desk.opened.close()
    with pytest.raises(RunFolderError, match=r"events\.jsonl, line 2 says no time"):
        resume(tmp_path / "run", None, [])


def test_where_the_broker_listened_is_kept(tmp_path: Path) -> None:
    desk = begun(tmp_path / "run")
    assert RunFolder(tmp_path / "run").endpoint() is None
    desk.opened.write_endpoint("tcp://127.0.0.1:5558", None)
    assert RunFolder(tmp_path / "run").endpoint() == "tcp://127.0.0.1:5558"
    for garbage in (b"\xff\xfe", b"here", b"tcp://127.0.0.1:*", b""):
        (tmp_path / "run" / "endpoint").write_bytes(garbage)
        with pytest.raises(RunFolderError, match=r"endpoint is damaged: .*; write into it where the broker listened"):
            RunFolder(tmp_path / "run").endpoint()
    desk.opened.close()


def test_to_go_on_needs_neither_torch_nor_the_base_model() -> None:
    program = (
        "import sys, broker.__main__, broker.opening, broker.server\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5557", "tcp://10.0.0.1:5557"])
def test_the_invite_of_a_broker_that_listens_everywhere_is_for_this_machine(tmp_path: Path, endpoint: str) -> None:
    desk = begun(tmp_path / "run")
    desk.opened.write_endpoint(endpoint, "0" * 40)
    everywhere = "0.0.0.0" in endpoint
    assert Invite.read(tmp_path / "run" / "invite.toml").endpoint == endpoint.replace("0.0.0.0", "127.0.0.1")
    assert ("# For this machine; " in (tmp_path / "run" / "invite.toml").read_text()) == everywhere
    assert (tmp_path / "run" / "endpoint").read_text() == endpoint + "\n", "where the next broker binds"
    desk.opened.close()
