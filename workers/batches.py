"""Which rows a client trains on in which step: a pure function, so that a run can be repeated and resumed anywhere.

A client walks through its rows epoch by epoch, each in an order of its own, and a step takes the next
accumulate x batch_size of them; how a row came about is `workers.rows`' business.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from parablock.batch import IGNORED, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from parablock import sections
    from workers.rows import Row, Rows


def step_batches(
    rows: Rows, seed: int, client: str, first: int, steps: int, settings: sections.Solver
) -> list[tuple[Batch, ...]]:
    """The micro-batches of `steps` steps, the first of them number `first` of the client's whole run: one tuple of
    `settings.accumulate` batches for each.

    Every row comes once per epoch; a batch that is larger than what is left of one goes on into the next, so there
    may be fewer rows than a batch. seed, client: decide the order, and nothing else does.
    """
    per_step = settings.accumulate * settings.batch_size

    def batch(step: int, part: int) -> Batch:
        cursor = step * per_step + part * settings.batch_size
        places = range(cursor, cursor + settings.batch_size)
        return collate([rows[_row_at(place, len(rows), seed, client)] for place in places], rows.pad_id)

    return [tuple(batch(step, part) for part in range(settings.accumulate)) for step in range(first, first + steps)]


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """The rows as one batch, filled up on the right to the longest of them."""
    length = max(len(row.tokens) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(row.tokens).long()
        input_ids[place, : len(tokens)] = tokens
        attention_mask[place, : len(tokens)] = 1
        labels[place, : len(tokens)] = tokens.masked_fill(torch.from_numpy(~row.counted), IGNORED)
    return Batch(input_ids, attention_mask, labels)


def _row_at(place: int, count: int, seed: int, client: str) -> int:
    epoch, within = divmod(place, count)
    return int(_order(count, seed, client, epoch)[within])


@functools.lru_cache(maxsize=8)  # a round asks for one or two epochs, thousands of times
def _order(count: int, seed: int, client: str, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1."""
    # Not hash(): it differs from process to process.
    entropy = hashlib.sha256(f"parablock rows {seed} {epoch} {client}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(entropy, "little"))).permutation(count)
