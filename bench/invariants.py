"""What must hold of a run, whatever was done to its processes: each check is a plain function from what was seen to
the sentences that say what is wrong, none if nothing is.

The journal's entries are the truth about what was counted; the clients' own lines (`bench.listener`) say what they
were told and what they gave.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from parablock.aggregation import server_move, weighted_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from bench.listener import Line
    from bench.synthetic import Update
    from parablock.config import Config
    from parablock.saved import Entry

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Exit:
    """How a process ended. killed: by us. complete: whether every round was committed by then."""

    name: str
    code: int
    killed: bool
    complete: bool


@dataclass(frozen=True)
class Held:
    """The newest version of a block, and the round that made it."""

    round: int
    values: Vector


def history(entries: Sequence[Entry]) -> Iterator[str]:
    """Every round is in the journal once, in order, and counts nobody twice."""
    rounds = [entry.round for entry in entries]
    if rounds != list(range(len(rounds))):
        wrong = next(place for place, round in enumerate(rounds) if round != place)
        yield f"entry {wrong} of the journal is of round {rounds[wrong]}"
    for entry in entries:
        if len(set(entry.contributors)) < len(entry.contributors):
            yield f"round {entry.round} counts somebody twice: {', '.join(entry.contributors)}"
        if not len(entry.contributors) == len(entry.weights) == len(entry.steps) == len(entry.losses):
            yield f"round {entry.round} has not one weight, number of steps and loss for each contributor"
        if bool(entry.contributors) != bool(entry.attempt):
            yield f"round {entry.round} is of attempt {entry.attempt} and counts {len(entry.contributors)}"


def unchanged(before: Sequence[Entry], after: Sequence[Entry]) -> Iterator[str]:
    """What was committed once stays as it was, and nothing of it goes."""
    if len(after) < len(before):
        yield f"the journal had {len(before)} rounds, and then {len(after)}"
    for old, new in zip(before, after, strict=False):
        if old != new:
            yield f"round {old.round} was rewritten: {old}, then {new}"


def epochs_rise(epochs: Sequence[int]) -> Iterator[str]:
    """Each of the broker's processes that got so far has an epoch of its own, above the last."""
    for before, after in pairwise(epochs):
        if after <= before:
            yield f"epoch {after} came after epoch {before}"


def announced(client: str, lines: Sequence[Line], entries: Sequence[Entry]) -> Iterator[str]:
    """Every commit that a client was told of is in the journal, and is what it was told."""
    for line in lines:
        if line.what != "commit":
            continue
        if line.round >= len(entries):
            yield f"{client} was told of round {line.round} by epoch {line.epoch}; the journal ends before it"
            continue
        entry = entries[line.round]
        counted = client in entry.contributors
        said = (line.block, line.contributors, line.counted)
        # A block that is sent in full to somebody who missed it is of attempt 0, whichever made it.
        if said != (entry.block, len(entry.contributors), counted) or line.attempt not in (0, entry.attempt):
            yield f"{client} was told of round {line.round} otherwise than the journal has it: {line}, {entry}"


def forward(client: str, lines: Sequence[Line]) -> Iterator[str]:
    """A client is put in session by epochs that never fall, and each of its processes trains rounds that rise."""
    epoch, trained = 0, -1
    for line in lines:
        if line.what == "born":
            trained = -1
        if line.what == "start":
            if line.epoch < epoch:
                yield f"{client} was started by epoch {line.epoch} after epoch {epoch}"
            epoch = line.epoch
        if line.what == "contribute":
            if line.round <= trained:
                yield f"{client} trained round {line.round} after round {trained}"
            trained = line.round


def agreed(client: str, lines: Sequence[Line], entries: Sequence[Entry]) -> Iterator[str]:
    """What a client trained was its round's block, whichever broker had said so."""
    for line in lines:
        if line.what == "contribute" and line.round < len(entries) and line.block != entries[line.round].block:
            yield f"{client} trained block {line.block} in round {line.round}, which is of {entries[line.round].block}"


def rows_missing(rows: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> int:
    """Committed rounds that metrics.jsonl does not have."""
    return len(entries) - len({row["round"] for row in rows if row["kind"] == "round"})


def given(lines: Mapping[str, Sequence[Line]], entries: Sequence[Entry]) -> Iterator[str]:
    """Whoever was counted had trained that round, and is counted with what it gave."""
    made: dict[tuple[str, int], list[tuple[int, int, int, float]]] = {}
    for client, heard in lines.items():
        for line in heard:
            if line.what == "contribute":
                made.setdefault((client, line.round), []).append((line.block, line.weight, line.steps, line.loss))
    for entry in entries:
        for client, *numbers in zip(entry.contributors, entry.weights, entry.steps, entry.losses, strict=True):
            gave = made.get((client, entry.round), [])
            if (entry.block, *numbers) not in gave:
                yield f"round {entry.round} counts {client} with {numbers} for block {entry.block}; it gave {gave}"


def exits(seen: Sequence[Exit]) -> Iterator[str]:
    """Nobody ends but by our kill, or well when every round is committed."""
    for each in seen:
        if not each.killed and (each.code != 0 or not each.complete):
            when = "after the last round" if each.complete else "in the middle of the run"
            yield f"{each.name} ended {when} by itself, with code {each.code}"


def leftovers(folder: Path) -> Iterator[str]:
    """No file is left half-written."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".partial", ".tmp")):
            yield f"{path.relative_to(folder)} was left behind"


def metrics_once(rows: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> Iterator[str]:
    """metrics.jsonl has no round twice, and none that is not committed."""
    for round, times in Counter(row["round"] for row in rows if row["kind"] == "round").items():
        if times > 1:
            yield f"metrics.jsonl has round {round} {times} times"
        if round >= len(entries):
            yield f"metrics.jsonl has round {round}, which is not in the journal"


def folded(
    config: Config, base: Sequence[Vector], entries: Sequence[Entry], update: Callable[[str, int, int], Update]
) -> dict[int, Held]:
    """The blocks that follow from the journal: every contribution that it counts, made again and folded in its order.

    base: values of the base model by block, of shape (numel,). update: what (client, round, numel) gives. In float32
    as the broker folds, so that equal means bit for bit. Blocks that no round has changed are left out.
    """
    assert config.codec.up == config.codec.down == "float32", "a lossy codec's residuals do not follow from the journal"
    values = list(base)
    state: dict[int, dict[str, Vector]] = {}
    found: dict[int, Held] = {}
    normalised = config.round.weights == "normalised"
    for entry in entries:
        if not entry.contributors:
            continue
        x = values[entry.block]
        deltas = [update(client, entry.round, x.size).values for client in entry.contributors]
        mean = weighted_mean(deltas, entry.weights, entry.steps if normalised else None)
        move, state[entry.block] = server_move(config.server, mean, state.get(entry.block, {}))
        values[entry.block] = x + move
        found[entry.block] = Held(entry.round, values[entry.block])
    return found


def same_blocks(found: Mapping[int, Held], expected: Mapping[int, Held]) -> Iterator[str]:
    """Bit for bit."""
    for block in sorted(found.keys() | expected.keys()):
        has, should = found.get(block), expected.get(block)
        if has is None or should is None:
            yield f"block {block} is missing" if has is None else f"block {block} is there, and no round made it"
        elif has.round != should.round:
            yield f"block {block} is round {has.round}'s, the journal's last is {should.round}"
        elif has.values.tobytes() != should.values.tobytes():
            differ = int(np.count_nonzero(has.values != should.values))
            yield f"block {block} differs in {differ} of {has.values.size} values from what the journal folds to"


def digest(held: Mapping[int, Held]) -> str:
    """As light clients report it: SHA-256 over the blocks and their rounds, as hexadecimal text."""
    found = hashlib.sha256()
    for block, each in sorted(held.items()):
        found.update(f"{block} {each.round}\n".encode())
        found.update(each.values.tobytes())
    return found.hexdigest()
