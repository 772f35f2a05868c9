"""`parablock verify` and `parablock gc`: each kind of damage is found and named, what can be made anew is, and what is
needed is never dropped."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from broker.record import Record
from parablock import gc_command, verify_command
from parablock.accountant import epsilon
from parablock.block_file import Label, file_name
from parablock.config import from_dict, to_dict
from parablock.journal import Journal
from parablock.journal_rows import Facts, Incarnation, Row, entry_json
from parablock.manifest import Block, Manifest, Slot
from parablock.run_folder import RunFolder
from parablock.witness import Witness
from tests.test_journal import row

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = from_dict({"mode": "fedbcd", "rounds": 9, "codec": {"down": "int8"}})
MANIFEST = Manifest(tuple(Block(i, f"layer {i}", (Slot(f"w{i}", (4,), "float32", 0),)) for i in range(2)), ())
LIFE = Incarnation(json.dumps(to_dict(CONFIG)), "now", 1, "here", "", 0.0)


def save(folder: RunFolder, made: Row) -> None:
    label = Label(made.entry.block, made.entry.round + 1, MANIFEST.digest, "run-1")
    values = np.full(4, made.entry.round, np.float32)
    folder.blocks.save(label, {"block": values, "residual": values}, entry_json(made.entry))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Seven rounds of two blocks, of which the three newest versions each are there; nobody was counted in round 3."""
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.write_manifest(MANIFEST, "base", tokenizer="tokens", run="run-1")
        for block in MANIFEST.blocks:
            folder.blocks.save(Label(block.index, 0, MANIFEST.digest, "run-1"), {"block": np.zeros(4, np.float32)})
        with Journal.create(
            folder.path / "journal.sqlite", Facts("run-1", MANIFEST.digest, "base", "tokens", "")
        ) as made:
            made.begin_epoch(LIFE)
            for round in range(7):
                if row(round).version is not None:
                    save(folder, row(round))
                made.append(row(round))
        for block in MANIFEST.blocks:
            for path in folder.blocks.superseded(block.index, keep=3):
                path.unlink()
        folder.append_metrics({"round": 0})
        folder.append_event({"time_s": 1.5, "kind": "joined"})
    return tmp_path / "run"


def verified(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, list[str]], str]:
    """The exit code, what is wrong by file, and what was said on stderr."""
    capsys.readouterr()
    code = verify_command.main([str(run), "--json", *arguments])
    out, err = capsys.readouterr()
    problems: dict[str, list[str]] = {}
    for check in json.loads(out)["checks"]:
        for problem in check["problems"]:
            problems.setdefault(problem["file"], []).append(problem["text"])
    return code, problems, err


def change(run: Path, statement: str) -> None:
    with sqlite3.connect(run / "journal.sqlite") as connection:
        connection.execute(statement)
    connection.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newest(run: Path) -> list[tuple[int, list[float]]]:
    return [(block.label.version, block.values.tolist()) for block in RunFolder.open(run).read_blocks()]


def test_an_intact_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_command.main([str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "config.toml fedbcd, 9 rounds intact" in shown
    assert "manifest.json 2 blocks, 8 parameters intact" in shown
    assert "journal.sqlite 7 rounds, 1 brokers intact" in shown
    assert "blocks 6 versions of 2 of 2 blocks intact" in shown
    assert "metrics.jsonl 1 rows intact" in shown
    before = sorted(path.name for path in run.rglob("*"))
    assert verified(run, capsys) == (0, {}, "")
    assert sorted(path.name for path in run.rglob("*")) == before, "it reads only"


def test_a_live_broker_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder.open(run) as folder:
        folder.lock("noon")
        (run / "blocks" / ".0000-000009.safetensors.partial").write_bytes(b"")
        assert verify_command.main([str(run)]) == 0
        assert "since noon): what it writes meanwhile may not have been looked at" in capsys.readouterr().out
        assert verify_command.main([str(run), "--rebuild"]) == 2
        assert gc_command.main([str(run)]) == 2
        assert capsys.readouterr().err.count("is in use by a broker") == 2


@pytest.mark.parametrize(
    ("file", "damaged", "says"),
    [
        ("config.toml", "rounds = ", "is not valid TOML"),
        ("manifest.json", "{}", "manifest.json is damaged"),
        ("journal.sqlite", "SQLite", "is damaged"),
        ("metrics.jsonl", "{torn\n", "line 1 is not valid JSON"),
        ("events.jsonl", "3\n", "line 1 is not a JSON object"),
        ("trace.json", "[\n?\n]\n", "line 2 is not a trace event"),
        ("events.jsonl", '{"kind": "joined"}\n', "line 1 says no time: time_s is a number of seconds, got 'nothing'"),
        ("events.jsonl", '{"time_s": "soon"}\n', "got 'soon'"),
        ("blocks/0001-000006.safetensors", "short", "is torn"),
        ("endpoint", "\0", "is damaged: an endpoint is tcp://HOST:PORT"),
        ("endpoint", "", "is damaged: an endpoint is tcp://HOST:PORT"),
        ("launch.json", "{torn", "is damaged: JSONDecodeError"),
        ("launch.json", "3", "is damaged: TypeError"),
        ("launch.json", '{"workers": 0, "device": "auto", "threads": 1}', "at least 1 each"),
        ("launch.json", '{"workers": 2, "device": "auto"}', "is damaged: KeyError('threads')"),
        ("partition.json", "{torn", "partition.json is damaged"),
    ],
)
def test_every_damaged_file_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, damaged: str, says: str
) -> None:
    (run / file).write_text(damaged)
    code, problems, _ = verified(run, capsys)
    assert code == 1
    assert list(problems) == [file]
    assert says in problems[file][0]
    assert verify_command.main([str(run)]) == 1
    assert f"\n{file}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("label", "tensors", "entry", "says"),
    [
        ({"run": "run-2"}, {}, "", "it is of the run 'run-2', and this one is 'run-1'"),
        ({"manifest": "another"}, {}, "", "it is of another model than manifest.json"),
        ({"index": 2}, {}, "", "the model has 2 blocks"),
        ({}, {"block": 3}, "", "its block holds 3 elements instead of 4"),
        ({}, {"server.first": 4}, "", "it holds ['server.first'], for which the settings have no use"),
        ({}, {}, entry_json(row(2).entry), "its entry is of round 2 and block 0"),
        ({}, {}, "", "it holds no entry of its round"),
        ({}, {}, entry_json(replace(row(4).entry, late=7)), "its entry of round 4 is not that of journal.sqlite"),
        ({"version": 0}, {}, entry_json(row(4).entry), "a round's entry is in it, and no round made it"),
    ],
)
def test_a_version_that_does_not_belong_here_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], label: dict[str, Any], tensors: dict[str, int], entry: str, says: str
) -> None:
    folder = RunFolder.open(run)
    odd = replace(Label(0, 5, MANIFEST.digest, "run-1"), **label)
    numel = tensors.get("block", 4)
    made = {name: np.zeros(numel, np.float32) for name in {"block": 4} | tensors}
    folder.blocks.save(odd, made, entry)
    code, problems, _ = verified(run, capsys)
    assert code == 1
    (text,) = problems[f"blocks/{file_name(odd.index, odd.version)}"]
    assert f"is intact, and does not belong here: {says}" in text
    if odd.index == 0:
        flip(run / "blocks" / "0000-000007.safetensors")
        assert collected(run, capsys, "--keep", "1")[0] == 0
        ours = 5 if odd.version == 0 else 3
        assert RunFolder.open(run).blocks.listed()[0] == [ours, 7], "the newest that is intact and ours stays"


def test_a_manifest_of_another_model_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.open(run).write_manifest(Manifest(MANIFEST.blocks, ("head",)))
    assert "is of a model of the digest" in verified(run, capsys)[1]["journal.sqlite"][0]


@pytest.mark.parametrize("name", ["run", "weights", "tokenizer"])
def test_a_manifest_that_says_another_run_is_told(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    facts = {"weights": "base", "tokenizer": "tokens", "run": "run-1"} | {name: "another"}
    RunFolder.open(run).write_manifest(MANIFEST, facts.pop("weights"), **facts)
    code, problems, _ = verified(run, capsys)
    assert code == 1
    assert f"its {name} is 'another', and journal.sqlite says" in problems["manifest.json"][0]


def test_what_should_be_there_and_is_not_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "blocks" / "0000-000007.safetensors").unlink()
    code, problems, _ = verified(run, capsys)
    assert code == 1
    assert "the newest version of its block is not there" in problems["blocks/0000-000007.safetensors"][0]
    (run / "journal.sqlite").unlink()
    assert "there is no journal" in verified(run, capsys)[1]["journal.sqlite"][0]


def test_a_version_that_the_journal_does_not_tell_of_yet_is_no_damage(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broker was killed between the rename and the row; two such rounds there cannot be."""
    save(RunFolder.open(run), row(7))
    assert verified(run, capsys)[0] == 0
    save(RunFolder.open(run), row(8))
    code, problems, _ = verified(run, capsys)
    assert code == 1
    assert "it ends with round 6, and blocks holds what round 8 made" in problems["journal.sqlite"][0]


def test_a_journal_that_is_behind_its_witness_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Witness(3, 8, "").write(run / "journal.sqlite")
    code, problems, _ = verified(run, capsys)
    assert code == 1
    rows, epoch = problems["journal.sqlite"]
    assert "it ends with round 6, and 2 more were committed: it has lost rows, or is an old copy" in rows
    assert "it does not tell of the broker of epoch 3" in epoch
    (run / "journal.sqlite").unlink()
    verified(run, capsys, "--rebuild")
    with Journal.open(run / "journal.sqlite") as journal:
        assert (journal.behind, journal.begin_epoch(LIFE)) == (2, 4), "what was made anew knows it, too"
    (run / "journal.sqlite.witness").write_text("{torn")
    assert "journal.sqlite.witness is damaged" in verified(run, capsys)[1]["journal.sqlite.witness"][0]


def test_an_intact_journal_is_not_made_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, problems, err = verified(run, capsys, "--rebuild")
    assert (code, problems) == (0, {})
    assert "the journal is intact; it stays as it is" in err
    assert verify_command.main([str(run), "--rebuild", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["in_use_by"] is None, "it does not take itself for another"
    assert not (run / "journal.sqlite.damaged").exists()


@pytest.mark.parametrize("lost", ["a row", "the tail", "all", "the file"])
def test_a_journal_is_made_anew_from_what_is_intact(run: Path, capsys: pytest.CaptureFixture[str], lost: str) -> None:
    if lost == "a row":
        change(run, "UPDATE entries SET entry = replace(entry, 'answered', 'unanswered') WHERE round = 2")
    elif lost == "the tail":  # as of a copy from yesterday
        change(run, "DELETE FROM entries WHERE round > 2")
    elif lost == "all":
        (run / "journal.sqlite").write_bytes(bytes(4096))
    else:
        (run / "journal.sqlite").unlink()
    before = newest(run)
    assert verified(run, capsys)[0] == 1
    code, problems, err = verified(run, capsys, "--rebuild")
    assert (code, problems) == (0, {}), "and what was made is intact"
    assert "The run goes on with round 7" in err
    assert newest(run) == before
    with Journal.open(run / "journal.sqlite", read_only=True) as journal:
        assert (journal.facts.run, journal.facts.tokenizer) == ("run-1", "tokens")
        assert journal.last == row(6).entry
        assert journal.newest == {0: row(6), 1: row(5)}
        told = [entry.round for entry in journal.entries()]
        # From files: versions 3, 5, 7 of block 0 and 0, 2, 6 of block 1, where round 3 counted nobody.
        assert told == {"a row": [0, 1, 2, 4, 5, 6], "the tail": [0, 1, 2, 4, 5, 6]}.get(lost, [1, 2, 4, 5, 6])
        epochs = list(journal.incarnations)
        assert epochs == [1]
        assert journal.incarnations[1].settings == to_dict(CONFIG)
    assert (run / "journal.sqlite.damaged").exists() == (lost != "the file")


def test_a_journal_whose_disk_refuses_stays_as_it_is(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "journal.sqlite").read_bytes()
    (run / "journal.sqlite-wal").write_bytes(b"")
    (run / "journal.sqlite-shm").symlink_to(run / "nowhere")
    assert verify_command.main([str(run), "--rebuild"]) == 75
    err = capsys.readouterr().err
    assert "unable to open database file" in err
    assert err.endswith("give the same command again (no damage is known)\n")
    (run / "journal.sqlite-shm").unlink()
    (run / "journal.sqlite-wal").unlink()
    change(run, "UPDATE entries SET entry = replace(entry, 'answered', 'unanswered') WHERE round = 2")
    damaged = (run / "journal.sqlite").read_bytes()
    assert damaged != before

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "create", refuse)
        assert verify_command.main([str(run), "--rebuild"]) == 75
    assert "No space left" in capsys.readouterr().err
    assert (run / "journal.sqlite").read_bytes() == damaged
    assert not list(run.glob("*.damaged*"))


@pytest.mark.parametrize("step", range(5))
def test_a_rebuild_that_is_killed_is_gone_on_with(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before each of its renames: the new journal's, the three of the old one, and again the new one's."""
    keeper = sqlite3.connect(run / "journal.sqlite")
    keeper.execute("UPDATE entries SET entry = replace(entry, 'answered', 'unanswered') WHERE round = 6")
    keeper.commit()  # in the log, which is there until the connection is closed
    assert {"journal.sqlite", "journal.sqlite-shm", "journal.sqlite-wal"} < {path.name for path in run.iterdir()}
    (run / "journal.sqlite.damaged").write_text("of an earlier rebuild")
    rename, renames = os.replace, []

    def kill(source: Path, target: Path) -> None:
        if len(renames) == step:
            raise KeyboardInterrupt
        if "witness" not in target.name:
            renames.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            verify_command.main([str(run), "--rebuild"])
    keeper.close()
    code, problems, err = verified(run, capsys, "--rebuild")
    assert (code, problems) == (0, {})
    assert "with 7 rows; 0 rounds" in err
    assert (run / "journal.sqlite.damaged").read_text() == "of an earlier rebuild"
    with Journal.open(run / "journal.sqlite") as journal:
        assert journal.begin_epoch(LIFE) == 2


def test_no_epoch_is_handed_out_twice_after_a_rebuild_that_was_killed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that is there under its name tells of all epochs, whenever its maker dies."""
    for path in run.glob("journal.sqlite*"):
        path.unlink()
    opened = Journal.open

    def kill(path: Path, **how: Any) -> Journal:
        if path.exists():
            raise KeyboardInterrupt
        return opened(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "open", kill)
        with pytest.raises(KeyboardInterrupt):
            verify_command.main([str(run), "--rebuild"])
    verified(run, capsys, "--rebuild")
    with Journal.open(run / "journal.sqlite") as journal:
        assert journal.begin_epoch(LIFE) > 10**9


def test_the_old_journal_is_kept_with_its_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run.with_name("left")
    with Journal.open(run / "journal.sqlite") as journal:
        journal.append(row(7))
        shutil.copytree(run, left)
    content = bytearray((left / "journal.sqlite").read_bytes())
    content[:6] = b"broken"
    (left / "journal.sqlite").write_bytes(content)
    log = (left / "journal.sqlite-wal").read_bytes()
    assert log
    assert "The old one is journal.sqlite.damaged." in verified(left, capsys, "--rebuild")[2]
    assert (left / "journal.sqlite.damaged").read_bytes() == content
    assert (left / "journal.sqlite.damaged-wal").read_bytes() == log


def test_a_damaged_version_tells_a_new_journal_that_its_round_was_held(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "journal.sqlite").unlink()
    flip(run / "blocks" / "0000-000007.safetensors")
    code, problems, err = verified(run, capsys, "--rebuild")
    assert (code, list(problems)) == (1, ["blocks/0000-000007.safetensors"])
    assert "The run goes on with round 7" in err
    with Journal.open(run / "journal.sqlite", read_only=True) as journal:
        last = journal.last
        assert last is not None
        assert (last.block, last.attempt, last.contributors, last.agenda) == (0, 0, (), row(5).entry.agenda)
        assert journal.newest[0].version == 7


def test_a_version_of_a_round_that_the_run_has_not_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "journal.sqlite").unlink()
    (run / "blocks" / "0001-000099.safetensors").write_text("of another run")
    assert verify_command.main([str(run), "--rebuild"]) == 2
    assert "0001-000099.safetensors is named as what round 98 made, and the run has 9 rounds" in capsys.readouterr().err


def test_a_rebuild_does_without_no_version_that_it_may_not_read(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "journal.sqlite").unlink()
    opened = type(run).open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "0000-000007.safetensors":
            raise OSError(5, "Input/output error")
        return opened(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(run), "open", refuse)
        assert verify_command.main([str(run), "--rebuild"]) == 75
    assert "Input/output error while" in capsys.readouterr().err
    assert "The run goes on with round 7" in verified(run, capsys, "--rebuild")[2]


def test_a_folder_that_does_not_say_which_run_it_is_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.open(run).write_manifest(MANIFEST)
    (run / "journal.sqlite").unlink()
    assert verify_command.main([str(run), "--rebuild"]) == 2
    assert "does not say which run it is of" in capsys.readouterr().err


def collected(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = gc_command.main([str(run), *arguments])
    return code, sorted(capsys.readouterr().out.splitlines())


def test_superseded_versions_and_unfinished_files_go(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = run / "blocks" / ".0000-000009.safetensors.partial"
    partial.write_bytes(b"half")
    (run / ".manifest.json.partial").write_bytes(b"half")
    assert "of a killed broker; `parablock gc` removes them" in said(run, capsys)
    gone = [
        ".manifest.json.partial",
        "blocks/.0000-000009.safetensors.partial",
        "blocks/0000-000003.safetensors",
        "blocks/0001-000000.safetensors",
    ]
    code, lines = collected(run, capsys, "--dry-run")
    assert (code, [line for line in lines if "/" in line or line.startswith(".")]) == (0, gone)
    assert partial.exists()
    code, lines = collected(run, capsys)
    assert (code, [line for line in lines if "/" in line or line.startswith(".")]) == (0, gone)
    assert lines[-1].startswith("4 files gone, 0.0 MB") or "4 files gone, 0.0 MB" in lines
    assert RunFolder.open(run).blocks.listed() == {0: [5, 7], 1: [2, 6]}
    assert verified(run, capsys)[0] == 0
    assert collected(run, capsys, "--keep", "1")[0] == 0
    assert RunFolder.open(run).blocks.listed() == {0: [7], 1: [6]}
    assert collected(run, capsys) == (0, ["0 files gone, 0.0 MB"])


def said(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert verify_command.main([str(run)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_newest_intact_version_never_goes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "blocks" / "0000-000007.safetensors")
    flip(run / "blocks" / "0000-000005.safetensors")
    assert collected(run, capsys, "--keep", "1")[0] == 0
    assert RunFolder.open(run).blocks.listed() == {0: [3, 7], 1: [6]}
    flip(run / "blocks" / "0000-000003.safetensors")
    assert gc_command.main([str(run), "--keep", "1"]) == 2
    assert "no version of block 0 is intact, so nothing is dropped" in capsys.readouterr().err
    assert RunFolder.open(run).blocks.listed() == {0: [3, 7], 1: [6]}


def test_gc_says_that_it_is_at_work(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks(*_: Any) -> list[Path]:
        assert verify_command.main([str(run)]) == 0
        return []

    monkeypatch.setattr(gc_command, "droppable", looks)
    assert gc_command.main([str(run)]) == 0
    assert "in use by parablock gc (process " in capsys.readouterr().out


def test_wrong_input_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gc_command.main([str(run), "--keep", "0"]) == 2
    assert "--keep is at least 1, got 0" in capsys.readouterr().err
    for command in (gc_command.main, verify_command.main):
        assert command([str(tmp_path / "nowhere")]) == 2
        assert "there is no run folder" in capsys.readouterr().err


def test_a_disk_that_refuses_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(run), "unlink", refuse)
    assert gc_command.main([str(run)]) == 75
    assert "Read-only file system; when the disk no longer refuses, give the same" in capsys.readouterr().err
    shutil.copy(run / "config.toml", run / "journal.sqlite")
    monkeypatch.setattr("parablock.rebuild.replace", refuse)
    assert verify_command.main([str(run), "--rebuild"]) == 75
    assert "Read-only file system; when the disk no longer refuses, give the same" in capsys.readouterr().err


def test_a_rebuilt_run_has_cost_no_less_than_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions that are superseded are gone, and with the journal all that told whose data were in them."""
    config = from_dict(
        {
            "mode": "fedbcd",
            "rounds": 40,
            "codec": {"down": "int8"},
            "privacy": {"where": "central", "clip": 1.0, "noise": 4.0, "budget": 100.0, "rounds": 40},
        }
    )
    with RunFolder.create(tmp_path / "run", config) as folder:
        folder.write_manifest(MANIFEST, "base", tokenizer="tokens", run="run-1")
        for block in MANIFEST.blocks:
            folder.blocks.save(Label(block.index, 0, MANIFEST.digest, "run-1"), {"block": np.zeros(4, np.float32)})
        facts = Facts("run-1", MANIFEST.digest, "base", "tokens", "")
        with Journal.create(folder.path / "journal.sqlite", facts) as made:
            made.begin_epoch(LIFE)
            for round in range(30):
                who = ("a",) if round % 3 else ("a", "b")
                entry = replace(row(0).entry, round=round, block=round % 2, charged=who, clients=("a", "b"))
                save(folder, Row(entry, round + 1))
                made.append(Row(entry, round + 1))
        for block in MANIFEST.blocks:
            for path in folder.blocks.superseded(block.index, keep=2):
                path.unlink()

    def cost() -> tuple[int, float]:
        folder = RunFolder.open(tmp_path / "run")
        with Journal.open(folder.path / "journal.sqlite", read_only=True) as journal, folder:
            record = Record(folder, MANIFEST, config, 0.0, entries=journal.entries())
            assert record.epsilon is not None
            record.close()
            return journal.next_round, record.epsilon

    before = cost()
    (tmp_path / "run" / "journal.sqlite").unlink()
    assert verified(tmp_path / "run", capsys, "--rebuild")[0] == 0
    assert cost() == before == (30, epsilon(4.0, 30, 1e-5)), "all of it is charged: a was in every round"
