"""Rows of tokens, made from a source's records as the settings say: fields, template, chat template, truncation.

Tokenizes, truncates, and counts by reason what is truncated or dropped. Where records come from is `workers.sources`'
business, which of their text counts `workers.segments`', how rows become batches `workers.batches`'. No message and no
repr holds text or tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.division import read_shard
from workers.labels import label
from workers.segments import Segmenter, Segments, Unusable
from workers.sources import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from parablock import sections

__all__ = ["DataError", "Row", "Rows", "load_rows"]

_SEGMENTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Row:
    """One row. place: in its source, from 0, over all shards.

    tokens: int32, shape (n,). counted: bool, shape (n,), whether the token is one to be predicted. prompt: how many
    tokens stand before the answer, 0 where the row asks nothing. answer: the reference for a generated answer. task:
    "" where tasks are not told apart.
    """

    place: int
    tokens: NDArray[np.int32] = field(repr=False)
    counted: NDArray[np.bool_] = field(repr=False)
    prompt: int
    answer: str = field(repr=False)
    task: str = ""


@dataclass(frozen=True)
class Rows:
    """The usable rows of a shard. read: how many it has in all; truncated, dropped: what became of the others.

    pad_id: the token that fills short rows up in a batch; any would do, none is ever looked at.
    """

    rows: tuple[Row, ...] = field(repr=False)
    pad_id: int
    read: int
    truncated: int
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def summary(self) -> str:
        """One line: how many rows are used, and what happened to the rest and why."""
        parts = [f"{len(self)} of {self.read} rows used"]
        if self.truncated:
            parts.append(f"{self.truncated} truncated to data.max_tokens")
        parts += [f"{count} dropped: {reason}" for reason, count in sorted(self.dropped.items())]
        return "; ".join(parts)


def load_rows(
    source: str,
    settings: sections.Data,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    held_out: bool,
    shard: tuple[int, int] = (0, 1),
    limit: int = 0,
    partition: sections.Partition | None = None,
    task: str = "",
) -> Rows:
    """Read `source` (see `workers.sources.read`) and tokenize the rows of `shard`.

    partition: how the rows are divided into shards; None: in turn. task: the field that names a row's task, "" for
    none; a row without it is an error, as it would be missing in every task's score.
    Raises DataError where the source or a field is missing, or where no row is usable. Only a shard of held-out
    rows other than the first may be empty: a few of them need not be enough for all workers.
    """
    make = Segmenter(source, settings, tokenizer)
    records = read_shard(
        source, partition, split=settings.split, seed=seed, held_out=held_out, shard=shard, limit=limit
    )
    if not records and shard[0] > 0 and not held_out:
        index, count = shard
        raise DataError(
            f"{source} has no row for shard {index}/{count}: rows are dealt out in turn, so {count} clients need at "
            f"least {count} of them, and it has {index} at most; take fewer clients, or more rows"
        )
    make.check_fields([record for _, record in records])
    dropped: Counter[str] = Counter()
    texts: list[tuple[int, str, Segments]] = []
    for place, record in records:
        named = label(record, task, setting="eval.task", where=f"{source}, row {place + 1}") if task else ""
        try:
            texts.append((place, named, make(record)))
        except Unusable as reason:
            dropped[str(reason)] += 1
    truncated, rows = 0, []
    for (place, named, text), ids in zip(texts, _tokenized(tokenizer, [text for *_, text in texts]), strict=True):
        tokens, counted, prompt = make.joined(text, ids)
        longer = len(tokens) > settings.max_tokens
        tokens, counted = tokens[: settings.max_tokens], counted[: settings.max_tokens]
        # The first token has nothing before it that could predict it.
        if counted[1:].any():
            asks = 0 < prompt < len(tokens)  # of a cut conversation the last question may be gone
            rows.append(Row(place, tokens, counted, prompt if asks else 0, text.answer if asks else "", named))
            truncated += longer
        else:
            dropped["nothing left of the answer within data.max_tokens" if longer else "too short"] += 1
    if not rows and not (held_out and not records and shard[0] > 0):
        reasons = "; ".join(f"{count} dropped: {reason}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"{source} has no usable rows in shard {shard[0]}/{shard[1]} ({len(records)} read{'; ' * bool(reasons)}"
            f"{reasons}); check the file, and data.format and data.max_tokens in the run's config"
        )
    pad_id = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return Rows(tuple(rows), pad_id, len(records), truncated, dict(dropped))


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Segments]) -> Iterator[list[list[int]]]:
    """The token ids of each text's segments, tokenized many at once."""
    for start in range(0, len(texts), _SEGMENTS_AT_ONCE):
        group = texts[start : start + _SEGMENTS_AT_ONCE]
        segments = [segment for text in group for segment, _ in text.parts]
        # verbose: rows that are longer than the model's context are cut, and told, by us.
        ids = iter(tokenizer(segments, add_special_tokens=False, verbose=False)["input_ids"])
        for text in group:
            yield [next(ids) for _ in text.parts]
