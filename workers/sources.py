"""Where rows are read from: the built-in problems, a file, or a dataset of the hub; a limit and a shard of them.

A row here is a dictionary as its source has it. Files are read line by line with the standard library (Parquet with
pyarrow): a wrong line can be named, no type is guessed, and no copy of private text is left in a cache. Which fields
count and how they become tokens is `workers.rows`' business. No message holds text from a row.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parablock.problems import problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Record = dict[str, Any]

BUILTIN_TRAIN_ROWS = 8192
BUILTIN_EVAL_ROWS = 512


_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


class DataError(ValueError):
    """The rows cannot be used. The message names the source, what was expected, what came, and what to do."""


def records(source: str, *, split: str, seed: int, held_out: bool, limit: int) -> Iterable[Record]:
    """The first `limit` rows of `source` (0: all) in its own order; see `read`. Raises DataError, also on the way."""
    return itertools.islice(_records(source, split=split, seed=seed, held_out=held_out, limit=limit), limit or None)


def read(
    source: str, *, split: str, seed: int, held_out: bool, shard: tuple[int, int], limit: int
) -> list[tuple[int, Record]]:
    """The rows of `source` that belong to `shard`, each with its place in the source, from 0.

    source: "builtin", the path of a .jsonl, .json, .csv or .parquet file, or a dataset of the hub as
    NAME[:CONFIG][@SPLIT]. split: of a dataset that names none. seed, held_out: which of the built-in problems.
    shard: (i, n) takes rows i, i + n, i + 2n, ... of the first `limit` rows (0: of all).
    Raises DataError where the source cannot be read or the shard is out of range.
    """
    index, count = shard
    if count < 1 or not 0 <= index < count:
        raise DataError(
            f"there is no shard {index}/{count}: a shard is i/n with i from 0 to n - 1, as 0/2 and 1/2 for two workers"
        )
    found = records(source, split=split, seed=seed, held_out=held_out, limit=limit)
    return list(itertools.islice(enumerate(found), index, None, count))


def named_fields(records: Iterable[Record]) -> str:
    """The names of the records' fields, for a message: "answer, id and 2 more that are no plain names (...)".

    Only what looks like a name is shown: in a CSV file without a header line, the names are the text of its first row.
    """
    names = {name for record in records for name in record if name is not None}
    plain = sorted(name for name in names if _PLAIN_NAME.fullmatch(name))
    listed = ", ".join(plain)
    if others := len(names) - len(plain):
        verb = "is no plain name" if others == 1 else "are no plain names"
        counted = f"{others} more that {verb}" if plain else f"{others} that {verb}"
        listed += f"{' and ' * bool(plain)}{counted} (has the file a header line?)"
    return listed or "none"


def _records(source: str, *, split: str, seed: int, held_out: bool, limit: int) -> Iterable[Record]:
    if source == "builtin":
        if held_out:
            return problems(min(limit or BUILTIN_EVAL_ROWS, BUILTIN_EVAL_ROWS), seed, "eval")
        return problems(min(limit or BUILTIN_TRAIN_ROWS, BUILTIN_TRAIN_ROWS), seed, "train")
    if not source:
        raise DataError("there is no name of the data: give a file, a dataset's name, or builtin")
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise DataError(
                f"{source}: expected a file that ends in {', '.join(_READERS)}, got {path.suffix or 'none'}"
            )
        return _read_file(path, reader)
    if path.is_dir():
        raise DataError(f"{source} is a folder; give one of the files in it ({', '.join(_READERS)})")
    if reader is not None or source.startswith(("/", ".", "~")):
        raise DataError(f"there is no data file {source}; check the path")
    return _read_hub(source, split)


def _read_file(path: Path, reader: Any) -> Iterator[Record]:
    try:
        yield from reader(path)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                # Without its cause, which would show the text.
                raise DataError(f"{path}, line {number} is not valid JSON; mend or delete it") from None
            yield _object(record, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise DataError(f"{path} is not valid JSON; a file of one object per line should end in .jsonl") from None
    if not isinstance(records, list):
        raise DataError(f"{path} holds {_kind(records)}; expected a list of objects")
    for number, record in enumerate(records, start=1):
        yield _object(record, f"{path}, row {number}")


def _object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"{where} holds {_kind(record)}; expected an object with the row's fields")
    return record


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # documents are longer than the module's default allows
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            yield from reader
        except csv.Error:
            raise DataError(f"{path}, line {reader.line_num + 1} is not valid CSV; mend or delete it") from None


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet ({type(error).__name__}); is it complete?") from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_hub(source: str, split: str) -> Iterable[Record]:
    match = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@(.+))?", source)
    if match is None:
        raise DataError(f"{source!r} names no data: expected a file or a dataset, as NAME, NAME:CONFIG or NAME@SPLIT")
    import datasets  # seconds to import; a file needs none of it

    name, variant, own_split = match.groups()
    datasets.disable_progress_bars()
    try:
        rows: Iterable[Record] = datasets.load_dataset(name, variant, split=own_split or split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{source} is neither a file on this machine nor a dataset that can be had from the hub: {lines[0][:300]} "
            "Check the name (NAME, NAME:CONFIG, NAME@SPLIT) and the network, or give a file"
        ) from error
    return rows


def _kind(value: Any) -> str:
    """What a JSON value is, for people, without what it says."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
