"""A source's rows as they are divided over the clients of a simulated federation: labels read, one shard taken.

How rows are divided is `parablock.shards`' business, where they come from `workers.sources`'. Every worker reads the
whole source and keeps its own rows, so that nobody has to tell anybody which they are. No message holds text of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parablock.shards import ShardsError, divide
from workers.sources import DataError, Record, read, records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from parablock.config import Partition

_LONGEST_LABEL = 64


@dataclass(frozen=True)
class Division:
    """owners: each row's client, int64 of shape (rows,). labels: of each row, None where no field labels them."""

    owners: NDArray[np.int64]
    labels: list[str] | None = field(repr=False)


def divide_source(
    source: str, partition: Partition, *, split: str, seed: int, clients: int, held_out: bool = False, limit: int = 0
) -> Division:
    """The rows of `source` (see `workers.sources.read`) divided over `clients`.

    Raises DataError where the source cannot be read, a row has no label, or a client would have no rows.
    """
    rows = 0
    labels: list[str] | None = [] if partition.field else None
    for record in records(source, split=split, seed=seed, held_out=held_out, limit=limit):
        rows += 1
        if labels is not None:
            labels.append(_label(record, partition.field, f"{source}, row {rows}"))
    try:
        return Division(divide(partition, rows, labels, clients, seed), labels)
    except ShardsError as error:
        raise DataError(f"{source} cannot be divided: {error}") from None


def read_shard(
    source: str,
    partition: Partition | None,
    *,
    split: str,
    seed: int,
    held_out: bool,
    shard: tuple[int, int],
    limit: int,
) -> list[tuple[int, Record]]:
    """As `workers.sources.read`, with the shards of `partition`; None: rows in turn. Raises DataError."""
    index, clients = shard
    if partition is None or partition.method == "iid" or clients == 1:
        return read(source, split=split, seed=seed, held_out=held_out, shard=shard, limit=limit)
    division = divide_source(source, partition, split=split, seed=seed, clients=clients, held_out=held_out, limit=limit)
    # Read again rather than kept: each of many workers on one machine would hold all of it.
    again = records(source, split=split, seed=seed, held_out=held_out, limit=limit)
    rows = enumerate(zip(division.owners.tolist(), again, strict=True))
    return [(place, record) for place, (owner, record) in rows if owner == index]


def _label(record: Record, name: str, where: str) -> str:
    """The text of the label. where: names the row in a message."""
    if name not in record:
        there = ", ".join(sorted(other for other in record if other is not None)) or "none"
        raise DataError(
            f"{where} has no field {name!r}; it has {there}; name one that every row has, "
            "as in --set partition.field=NAME"
        )
    value = record[name]
    if value is None or value == "":
        raise DataError(f"{where} has nothing in the field {name!r}; fill it in, delete the row, or name another field")
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{where} has a value of type {type(value).__name__} in the field {name!r}; a label is a text, a number, "
            "true or false; name another field, as in --set partition.field=NAME"
        )
    label = _text(value)
    if len(label) > _LONGEST_LABEL or not _is_unicode(label):
        raise DataError(
            f"{where} has no label in the field {name!r} but {len(label)} characters of text; a label has at most "
            f"{_LONGEST_LABEL}, and all of them valid Unicode; name another field, as in --set partition.field=NAME"
        )
    return label


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, as JSON can hold."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
