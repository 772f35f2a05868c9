"""A source's rows as they are divided over the clients of a simulated federation: labels read, one shard taken.

How rows are divided is `parablock.shards`' business, where they come from `workers.sources`'. Every worker reads the
whole source and keeps its own rows, so that nobody has to tell anybody which they are; the digest in its log shows
whether two of them divided alike. No message holds text of a row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from parablock.shards import ShardsError, digest, divide
from workers.labels import MOST, label
from workers.sources import DataError, Record, read, records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from parablock.sections import Partition

log = logging.getLogger("worker")


@dataclass(frozen=True)
class Division:
    """owners: each row's client, int64 of shape (rows,). labels: of each row, None where no field labels them."""

    owners: NDArray[np.int64]
    labels: list[str] | None = field(repr=False)


def divide_source(
    source: str, partition: Partition, *, split: str, seed: int, clients: int, held_out: bool = False, limit: int = 0
) -> Division:
    """The rows of `source` (see `workers.sources.read`) divided over `clients`.

    Raises DataError where the source cannot be read, a row has no label, there are more than `labels.MOST` different
    ones, or a client would have no rows.
    """
    rows = 0
    labels: list[str] | None = [] if partition.field else None
    known: dict[str, str] = {}  # one text a label, not one a row
    for record in records(source, split=split, seed=seed, held_out=held_out, limit=limit):
        rows += 1
        if labels is not None:
            text = label(record, partition.field, setting="partition.field", where=f"{source}, row {rows}")
            labels.append(known.setdefault(text, text))
            if len(known) > MOST:
                raise DataError(
                    f"{source} has more than {MOST:,} different values in the field {partition.field!r}, which "
                    "partition.field names; a label is something that many rows have in common, as a task, a topic or "
                    "an author, not a text or an id; name another field, as in --set partition.field=NAME"
                )
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
    if partition.method not in ("dirichlet", "field"):
        partition = replace(partition, field="")  # labels that are only shown are nothing to a worker
    owners = divide_source(
        source, partition, split=split, seed=seed, clients=clients, held_out=held_out, limit=limit
    ).owners
    log.info(
        "rows of all %d clients: %d, divided by %s, digest %s", clients, len(owners), partition.method, digest(owners)
    )
    # Read again rather than kept: each of many workers on one machine would hold all of it.
    taken, place = [], -1
    for place, record in enumerate(records(source, split=split, seed=seed, held_out=held_out, limit=limit)):
        if place < len(owners) and owners[place] == index:
            taken.append((place, record))
    if place + 1 != len(owners):
        raise DataError(
            f"{source} has changed while it was read (first {len(owners)} rows, then {place + 1}); start again"
        )
    return taken
