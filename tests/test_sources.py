"""Reading records: every kind of file, shards, limits, and what is said of a file that is wrong."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from workers.sources import BUILTIN_EVAL_ROWS, BUILTIN_TRAIN_ROWS, DataError, Record, named_fields, read

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = [{"question": f'q{n}, "quoted"\nand more ü', "answer": f"#### {n}"} for n in range(7)]
SECRET = "the patient is called"
HEADER = " (has the file a header line?)"


def take(source: Path | str, **changes: Any) -> list[tuple[int, Record]]:
    arguments: dict[str, Any] = {"split": "train", "seed": 0, "held_out": False, "shard": (0, 1), "limit": 0}
    return read(str(source), **(arguments | changes))


def refusal(source: Path | str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        take(source, **changes)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or SECRET not in str(caught.value.__cause__)
    return str(caught.value)


def write(path: Path, records: list[Record]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".CSV"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows[1]{suffix.lower()}", RECORDS).rename(tmp_path / f"rows[1]{suffix}")
    assert take(path) == list(enumerate(RECORDS))


def test_a_long_csv_field_and_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"a,b\n{'x' * 200_000},1\nonly\n", encoding="utf-8")
    assert [record for _, record in take(path)] == [{"a": "x" * 200_000, "b": "1"}, {"a": "only", "b": None}]


@given(rows=st.integers(1, 40), shards=st.integers(1, 9), limit=st.integers(0, 50))
def test_shards_cover_the_first_rows_once(rows: int, shards: int, limit: int) -> None:
    taken = [row for shard in range(shards) for row in take("builtin", shard=(shard, shards), limit=limit or rows)]
    whole = take("builtin", limit=limit or rows)
    assert len(whole) == (limit or rows)
    assert sorted(taken, key=lambda row: row[0]) == whole
    assert [place for place, _ in take("builtin", shard=(0, shards), limit=rows)] == list(range(0, rows, shards))


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (5, 3)])
def test_a_shard_out_of_range(shard: tuple[int, int]) -> None:
    assert f"there is no shard {shard[0]}/{shard[1]}" in refusal("builtin", shard=shard)


def test_the_built_in_problems_by_seed_and_split() -> None:
    train, held_out = take("builtin"), take("builtin", held_out=True)
    assert (len(train), len(held_out)) == (BUILTIN_TRAIN_ROWS, BUILTIN_EVAL_ROWS)
    assert not {row["prompt"] for _, row in train} & {row["prompt"] for _, row in held_out}
    assert take("builtin", seed=1, limit=9) != take("builtin", limit=9) == train[:9]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", f'{{"a": 1}}\n{{"a": "{SECRET}\n', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", f'{{"a": 1}}\n["{SECRET}"]\n', "a.jsonl, line 2 holds a list; expected an object"),
        ("a.json", f'[{{"a": "{SECRET}', "a.json is not valid JSON"),
        ("a.json", f'{{"data": "{SECRET}"}}', "a.json holds an object; expected a list of objects"),
        ("a.json", f'["{SECRET}"]', "a.json, row 1 holds text; expected an object"),
        ("a.csv", f'a,b\n1,2\n"{SECRET}" x,2\n', "a.csv, line 3 is not valid CSV"),
        ("a.parquet", SECRET, "a.parquet cannot be read as Parquet"),
        ("a.txt", SECRET, "expected a file that ends in .jsonl, .json, .csv, .parquet, got .txt"),
    ],
)
def test_a_wrong_file_is_named_without_its_text(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    assert expected in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(SECRET.encode() + b"\xff\xfe")
    assert "is not UTF-8 text" in refusal(path)


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    assert "there is no data file" in refusal(tmp_path / "nothing.jsonl")
    assert "there is no data file" in refusal("nothing.jsonl")
    assert "there is no data file" in refusal("./nothing")
    assert "is a folder" in refusal(tmp_path)
    assert "no name of the data" in refusal("")
    assert "names no data" in refusal("@train")


def test_a_hub_name_goes_to_datasets_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, variant: str | None, *, split: str) -> list[Record]:
        asked.append((name, variant, split))
        return RECORDS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert take("org/name", shard=(1, 3), limit=6) == [(1, RECORDS[1]), (4, RECORDS[4])]
    take("org/name:main")
    take("org/name:main@test[:9]")
    take("name@test")
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "main", "train"),
        ("org/name", "main", "test[:9]"),
        ("name", None, "test"),
    ]


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("org/name")
    assert "org/name is neither a file on this machine nor a dataset" in message
    assert "much more" not in message


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "none"),
        ([{}], "none"),
        ([{"b": 1}, {"a_1.x-y": 2, "b": 3}], "a_1.x-y, b"),
        ([{"id": 1, "she is ill": 2, "3": 4, "x" * 41: 5}], "id and 3 more that are no plain names" + HEADER),
        ([{"id": 1, "Größe": 2}], "id and 1 more that is no plain name" + HEADER),
        ([{"a\n": 1, None: 2}], "1 that is no plain name" + HEADER),
    ],
)
def test_only_plain_names_of_fields_are_shown(records: list[Any], expected: str) -> None:
    assert named_fields(records) == expected
