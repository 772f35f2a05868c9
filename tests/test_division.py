"""A worker's shard of a source that is divided unevenly: its own rows and no others, and what is said of bad labels."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from parablock import builtin, config
from parablock.sections import Data, Partition
from parablock.shards import digest
from workers import division
from workers.division import divide_source, read_shard
from workers.rows import load_rows
from workers.setup import Local, prepare
from workers.sources import DataError, Record, read

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "the patient is called"
TASKS = ("maths", "poems", "news")
RECORDS = [{"task": TASKS[n % 3], "prompt": f"{n}?", "completion": f"#### {n}"} for n in range(60)]
DIRICHLET = Partition(method="dirichlet", alpha=1.0, field="task")


def write(folder: Path, records: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def shard(
    source: str, partition: Partition | None, index: int, clients: int, limit: int = 0
) -> list[tuple[int, Record]]:
    shard = (index, clients)
    return read_shard(source, partition, split="train", seed=0, held_out=False, shard=shard, limit=limit)


def refusal(source: str, partition: Partition = DIRICHLET, clients: int = 2) -> str:
    with pytest.raises(DataError) as caught:
        divide_source(source, partition, split="train", seed=0, clients=clients)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", ["dirichlet", "field", "quantity"])
def test_uneven_shards_cover_the_source_once(method: str, tmp_path: Path) -> None:
    source = write(tmp_path, RECORDS)
    partition = Partition(method=method, alpha=2.0, field="task")  # type: ignore[arg-type]
    taken = [row for index in range(3) for row in shard(source, partition, index, 3)]
    assert sorted(taken, key=lambda row: row[0]) == list(enumerate(RECORDS))
    owners = divide_source(source, partition, split="train", seed=0, clients=3).owners
    assert [place for place, _ in shard(source, partition, 1, 3)] == [n for n in range(60) if owners[n] == 1]


@pytest.mark.parametrize("partition", [None, Partition(), Partition(method="iid", field="nowhere")])
def test_rows_in_turn_are_read_as_ever(partition: Partition | None, tmp_path: Path) -> None:
    source = write(tmp_path, RECORDS)
    for index in range(3):
        former = read(source, split="train", seed=0, held_out=False, shard=(index, 3), limit=20)
        assert shard(source, partition, index, 3, limit=20) == former
        assert [place for place, _ in former] == list(range(index, 20, 3))


def test_without_a_shard_nothing_is_asked_of_the_rows(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "x", "completion": "y"}])
    assert len(shard(source, DIRICHLET, 0, 1)) == 1


def test_the_built_in_problems_can_be_divided_by_quantity() -> None:
    partition = Partition(method="quantity", alpha=1.0)
    taken = [shard("builtin", partition, index, 2, limit=50) for index in range(2)]
    assert len(taken[0]) != len(taken[1])
    assert sorted(place for rows in taken for place, _ in rows) == list(range(50))


def test_labels_are_texts_numbers_and_truth_values(tmp_path: Path) -> None:
    source = write(tmp_path, [{"task": value} for value in ("a", 1, 0.5, True, 0, 1.0)])
    divided = divide_source(source, Partition(field="task"), split="train", seed=0, clients=2)
    assert divided.labels == ["a", "1", "0.5", "True", "0", "1"]
    assert "maths" not in repr(divide_source(write(tmp_path, RECORDS), DIRICHLET, split="train", seed=0, clients=2))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": SECRET, "a": 1}, "row 2 has no field 'task', which partition.field names; it has a, text; name one"),
        ({SECRET: SECRET}, "row 2 has no field 'task', which partition.field names; it has 1 that is no plain name"),
        ({"task": [SECRET]}, "row 2 has a list in the field 'task', which partition.field names; a label is a text"),
        ({"task": SECRET * 5}, "row 2 has 105 characters in the field 'task', which partition.field names; a label"),
    ],
)
def test_a_row_without_a_label_is_named_without_its_text(row: Any, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(write(tmp_path, [{"task": "a"}, row]))


def test_a_field_of_texts_or_ids_is_no_label(tmp_path: Path) -> None:
    rows = [{"task": f"{SECRET} {n}"} for n in range(1001)]
    message = refusal(write(tmp_path, rows))
    assert "rows.jsonl has more than 1,000 different values in the field 'task', which partition.field names" in message
    assert "a label is something that many rows have in common" in message
    divided = divide_source(write(tmp_path, rows[:1000] * 2), DIRICHLET, split="train", seed=0, clients=2)
    assert len(divided.owners) == 2000
    # A label is kept once, however many rows have it.
    assert divided.labels is not None
    assert len({id(label) for label in divided.labels}) == 1000


@pytest.mark.parametrize("partition", [Partition("iid", field="nowhere"), Partition("quantity", 5.0, "nowhere")])
def test_a_worker_needs_no_label_that_is_only_shown(partition: Partition, tmp_path: Path) -> None:
    source = write(tmp_path, RECORDS)
    taken = [row for index in range(2) for row in shard(source, partition, index, 2)]
    assert sorted(taken, key=lambda row: row[0]) == list(enumerate(RECORDS))


@pytest.mark.parametrize("then", [59, 61])
def test_a_source_that_changes_between_its_two_readings(
    then: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = [RECORDS, [*RECORDS, *RECORDS][:then]]
    monkeypatch.setattr(division, "records", lambda *_, **__: readings.pop(0))
    expected = rf"rows.jsonl has changed while it was read \(first 60 rows, then {then}\); start again"
    with pytest.raises(DataError, match=expected):
        shard(str(tmp_path / "rows.jsonl"), DIRICHLET, 0, 2)


def test_workers_that_divide_otherwise_can_be_told_by_their_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worker")
    source = write(tmp_path, RECORDS)
    for index, clients in ((0, 3), (1, 3), (0, 2)):
        shard(source, DIRICHLET, index, clients)
    first, same, other = (record.getMessage().split("digest ") for record in caplog.records)
    owners = divide_source(source, DIRICHLET, split="train", seed=0, clients=3).owners
    assert first == same == ["rows of all 3 clients: 60, divided by dirichlet, ", digest(owners)]
    assert other[1] != first[1]


def test_what_cannot_be_divided_names_the_source(tmp_path: Path) -> None:
    source = write(tmp_path, RECORDS)
    by_field = Partition(method="field", field="task")
    assert refusal(source, by_field, 4).startswith(f"{source} cannot be divided: the field 'task' has 3 values")
    assert "60 rows for 61 clients" in refusal(source, clients=61)
    assert "there is no data file" in refusal(str(tmp_path / "nothing.jsonl"))


def test_rows_of_tokens_are_those_of_the_shard(tmp_path: Path) -> None:
    source = write(tmp_path, RECORDS)
    arguments: dict[str, Any] = {"tokenizer": builtin.tokenizer(), "seed": 0, "shard": (2, 3), "partition": DIRICHLET}
    rows = load_rows(source, Data(), held_out=False, **arguments)
    assert [row.place for row in rows] == [place for place, _ in shard(source, DIRICHLET, 2, 3)]


def test_a_worker_takes_its_shard_of_the_training_rows_and_its_turn_at_the_held_out_ones(tmp_path: Path) -> None:
    source = write(tmp_path, RECORDS)
    run = config.load(None, ["partition.method=field", "partition.field=task", "eval.rows=6"])
    local = Local(
        name="worker-1", train=source, held_out=source, shard=(1, 2), model="", device="cpu", threads=1,
        trust_remote_code=False,
    )  # fmt: skip
    setup = prepare(json.dumps(config.to_dict(run, shared_only=True)), local)
    assert {RECORDS[row.place]["task"] for row in setup.rows} == {"news"}
    assert setup.held_out is not None
    assert [row.place for row in setup.held_out] == [1, 3, 5]
