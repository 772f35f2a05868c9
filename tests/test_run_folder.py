"""The run folder: made once, appended to, and read back whole or with an error that names the file."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.block_file import Label
from parablock.config import ConfigError, from_dict
from parablock.manifest import Block, Manifest, Slot
from parablock.run_folder import RunFolder, RunFolderError
from parablock.shards import ShardCounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = from_dict({"mode": "fedbcd", "rounds": 3, "data": {"template": 'Q: "{prompt}"\nA:'}})
MANIFEST = Manifest(
    (
        Block(0, "layers 0-1", (Slot("a", (2, 3), "float32", 0), Slot("b", (), "bfloat16", 6))),
        Block(1, "head", (Slot("c", (4,), "float32", 0),)),
    ),
    ("embeddings",),
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path / "runs" / "first", CONFIG) as made:
        yield made


def values(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def test_the_config_is_read_back_as_it_was(folder: RunFolder) -> None:
    assert RunFolder.open(folder.path).config() == CONFIG


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, CONFIG).config() == CONFIG


@pytest.mark.parametrize("left", ["config.toml", "metrics.jsonl", "journal.sqlite", "blocks"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(
        RunFolderError, match=f"already holds a run \\({left}\\); go on with it by --resume .*, choose an"
    ):
        RunFolder.create(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_of_two_runs_that_take_a_folder_at_once_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").symlink_to("nowhere")  # the other's file, between this one's look and its write
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.create(tmp_path, CONFIG)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match=r"is a file, not a folder; choose another --out"):
        RunFolder.create(tmp_path / "file", CONFIG)
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*; choose another --out"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


def test_opening_what_is_no_run_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"is not a run folder \(it has no config\.toml\)"):
        RunFolder.open(tmp_path)


def test_a_config_edited_into_nonsense_names_its_file(folder: RunFolder) -> None:
    (folder.path / "config.toml").write_text("rounds = ")
    with pytest.raises(ConfigError, match=r"config\.toml is not valid TOML"):
        folder.config()


def test_rows_are_on_disk_as_they_are_appended(folder: RunFolder) -> None:
    folder.append_metrics({"kind": "round", "round": 0, "contributors": ("ä", "b")})
    assert RunFolder.open(folder.path).read_metrics() == [{"kind": "round", "round": 0, "contributors": ["ä", "b"]}]
    folder.append_metrics({"kind": "round", "round": 1})
    folder.append_event({"event": "joined"})
    folder.close()
    folder.append_event({"event": "left"})
    assert [row["round"] for row in folder.read_metrics()] == [0, 1]
    assert [row["event"] for row in folder.read_events()] == ["joined", "left"]


def test_a_run_that_has_said_nothing_yet_has_no_rows(folder: RunFolder) -> None:
    assert folder.read_metrics() == []
    assert folder.read_events() == []


def test_what_is_no_number_becomes_null(folder: RunFolder) -> None:
    with folder:
        folder.append_metrics({"loss": float("nan"), "by_client": {"a": [np.float64("inf"), 1.5]}, "alpha": None})
    text = (folder.path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None, "by_client": {"a": [None, 1.5]}, "alpha": None,
    }  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1), st.data())
def test_a_log_cut_anywhere_gives_the_rows_before_the_cut(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    whole = content[:cut].count(b"\n")
    with tempfile.TemporaryDirectory() as name, RunFolder.create(name, CONFIG) as folder:
        (folder.path / "metrics.jsonl").write_bytes(content[:cut])
        assert folder.read_metrics() == rows[:whole]
        folder.append_metrics({"after": "restart"})
        assert folder.read_metrics() == [*rows[:whole], {"after": "restart"}]


def test_a_row_that_was_cut_off_is_told(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    (folder.path / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1, "lo')
    with caplog.at_level(logging.WARNING):
        assert folder.read_metrics() == [{"round": 0}]
    assert "metrics.jsonl: its last line was cut off" in caplog.text


@pytest.mark.parametrize("line", ["{torn", "[1, 2]", ""])
def test_a_damaged_line_before_the_last_is_an_error_that_names_it(folder: RunFolder, line: str) -> None:
    (folder.path / "metrics.jsonl").write_text(f'{{"round": 0}}\n{line}\n{{"round": 2}}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2 is not"):
        folder.read_metrics()


def test_a_log_that_cannot_be_read_is_an_error_that_names_it(folder: RunFolder) -> None:
    (folder.path / "events.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"cannot read .*events\.jsonl"):
        folder.read_events()


def test_blocks_are_read_as_their_newest_versions(folder: RunFolder) -> None:
    first, second, odd = values(7), values(7, seed=1), np.array([np.nan, -0.0, np.inf, 1e-45], dtype=np.float32)
    for index, version, content in ((0, 0, first), (0, 1, first), (0, 6, second), (1, 0, odd)):
        folder.blocks.save(Label(index, version, MANIFEST.digest), {"block": content})
    loaded = RunFolder.open(folder.path).load_blocks()
    assert {index: version for index, (version, _) in loaded.items()} == {0: 6, 1: 0}
    assert loaded[0][1].tobytes() == second.tobytes()
    assert loaded[1][1].tobytes() == odd.tobytes()
    assert [(block.label.round, block.label.manifest) for block in folder.read_blocks()] == [
        (5, MANIFEST.digest),
        (-1, MANIFEST.digest),
    ]


def test_a_damaged_newest_version_is_named_and_no_older_one_passes_for_it(folder: RunFolder) -> None:
    for version in (1, 2):
        folder.blocks.save(Label(0, version, MANIFEST.digest), {"block": values(7)})
    path = folder.blocks.path(0, 2)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunFolderError, match=r"0000-000002\.safetensors is torn"):
        folder.load_blocks()


def test_one_broker_at_a_time(folder: RunFolder) -> None:
    folder.lock("noon")
    other = RunFolder.open(folder.path)
    with pytest.raises(RunFolderError, match=f"first is in use by a broker .process {os.getpid()} on .*, since noon"):
        other.lock("one")
    folder.close()
    other.lock("two")
    other.close()


def test_a_disk_that_refuses_is_no_wrong_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((type(tmp_path), "mkdir"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left on device"):
                RunFolder.create(tmp_path / "run", CONFIG)
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:  # nothing is in the way when there is room again
        monkeypatch.setattr("parablock.folder_lock.os.open", full)
        with pytest.raises(OSError, match="No space left on device"):
            folder.lock("noon")


def test_the_manifest_is_read_back_as_it_was(folder: RunFolder) -> None:
    assert not folder.has_manifest
    folder.write_manifest(MANIFEST, weights="abc", tokenizer="def", run="first-1")
    assert folder.has_manifest
    assert folder.manifest() == MANIFEST
    assert folder.weights_digest() == "abc"
    assert folder.run_facts() == {"run": "first-1", "weights": "abc", "tokenizer": "def"}


def test_a_damaged_manifest_is_found(folder: RunFolder) -> None:
    path = folder.path / "manifest.json"
    with pytest.raises(RunFolderError, match=r"cannot read .*manifest\.json"):
        folder.manifest()
    folder.write_manifest(MANIFEST)
    path.write_text(path.read_text().replace('"offset": 6', '"offset": 7'))
    with pytest.raises(RunFolderError, match="its digest does not match"):
        folder.manifest()
    path.write_text('{"blocks": 3}')
    with pytest.raises(RunFolderError, match=r"manifest\.json is damaged"):
        folder.manifest()


def test_the_division_of_the_rows_is_read_back(folder: RunFolder) -> None:
    assert folder.shard_counts() is None
    counts = ShardCounts("dirichlet", 0.3, "task", 7, (3, 9), {"news": (1, 7), "poems": (2, 2)})
    path = folder.path / "partition.json"
    path.write_text(json.dumps(counts.to_dict()), encoding="utf-8")
    assert folder.shard_counts() == counts
    for damaged in ("", "[]", "{}", json.dumps(counts.to_dict() | {"by_label": {"news": [1]}})):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(RunFolderError, match=r"partition\.json is damaged: .*; delete it, or let `parablock"):
            folder.shard_counts()
    path.unlink()
    path.mkdir()
    with pytest.raises(RunFolderError, match=r"cannot read .*partition\.json"):
        folder.shard_counts()
