"""Which client has which row where one source of rows is divided over the clients of a simulated federation.

Pure: from labels, settings and a seed to each row's client, the same in every process with the same numpy (another's
generator may draw otherwise; `digest` shows it). Where rows and labels come from is `workers.division`' business.
Methods (`partition.method`):

- iid: row by row in turn.
- dirichlet: each label's rows are shared out by proportions drawn from Dir(alpha), a draw a label (as arXiv 1905.12022
  draws them; Hsu et al., arXiv 1909.06335, draw each client's mix of labels from Dir(alpha) instead). Small alpha: a
  label is nearly all one client's; large alpha: as good as iid.
- field: each label is one client's. Of more labels than clients the largest is given away first, always to whoever has
  the fewest rows. Nothing is drawn.
- quantity: how many rows a client has is drawn from Dir(alpha); which ones, evenly.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from parablock.units import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from parablock.sections import Partition

OTHERS = "others"

_DRAWN = ("dirichlet", "quantity")
_LONGEST_NAME = 24
_MOST_TOLD = 32


class ShardsError(ValueError):
    """The rows cannot be divided like this. The message says what would come out, and what to do."""


def divide(settings: Partition, rows: int, labels: Sequence[str] | None, clients: int, seed: int) -> NDArray[np.int64]:
    """Each row's client, from 0: int64 of shape (rows,). labels: of each row; dirichlet and field need them.

    Raises ShardsError where a client would have no row.
    """
    if rows < clients:
        raise ShardsError(f"it has {rows} rows for {clients} clients, and each needs at least one; take fewer workers")
    if settings.method == "iid":
        return np.arange(rows) % clients
    if settings.method == "quantity":
        owners = _shared_out({"": np.arange(rows)}, rows, clients, settings, seed)
    else:
        assert labels is not None, f"{settings.method} divides by labels"
        assert len(labels) == rows, f"{len(labels)} labels for {rows} rows"
        places = _places(labels)
        if settings.method == "dirichlet":
            owners = _shared_out(places, rows, clients, settings, seed)
        else:
            owners = _given_away(places, rows, clients, settings.field)
    _check_nobody_is_empty(np.bincount(owners, minlength=clients))
    return owners


def digest(owners: NDArray[np.int64]) -> str:
    """16 hex digits that differ where two divisions do: the first of SHA-256 over the owners as little-endian int64."""
    return hashlib.sha256(owners.astype("<i8").tobytes()).hexdigest()[:16]


def _places(labels: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Where each label's rows are, labels in the order of their text."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        found[label].append(place)
    return {label: np.array(found[label], dtype=np.int64) for label in sorted(found)}


def _shared_out(
    places: Mapping[str, NDArray[np.int64]], rows: int, clients: int, settings: Partition, seed: int
) -> NDArray[np.int64]:
    """Each label's rows, shuffled and cut by its own draw from Dir(alpha)."""
    owners = np.empty(rows, dtype=np.int64)
    for label, there in places.items():
        generator = _generator(f"parablock shards {settings.method} {seed} {label}")
        shares = generator.dirichlet(np.full(clients, settings.alpha))
        dealt = generator.permutation(there)
        # Cuts of the whole, not rounded shares: every row is somebody's. One offset for all of them: a client has its
        # share of the rows on average, also of a label of few rows, which cuts to the nearest row give always the same.
        cuts = np.floor(np.cumsum(shares)[:-1] * len(there) + generator.random()).astype(np.int64)
        for client, part in enumerate(np.split(dealt, cuts)):
            owners[part] = client
    return owners


def _given_away(places: Mapping[str, NDArray[np.int64]], rows: int, clients: int, field: str) -> NDArray[np.int64]:
    if len(places) < clients:
        raise ShardsError(
            f"the field {field!r} has {counted(len(places), 'value')} for {clients} clients, and each needs one of "
            f"its own; take at most {counted(len(places), 'worker')}, or partition.method = dirichlet"
        )
    owners = np.empty(rows, dtype=np.int64)
    fewest = [(0, client) for client in range(clients)]
    for label in sorted(places, key=lambda label: (-len(places[label]), label)):
        held, client = fewest[0]
        owners[places[label]] = client
        heapq.heapreplace(fewest, (held + len(places[label]), client))
    return owners


def _generator(text: str) -> np.random.Generator:
    # Not hash(): it differs from process to process.
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")))


def _check_nobody_is_empty(held: NDArray[np.int64]) -> None:
    empty = np.flatnonzero(held == 0).tolist()
    if empty:
        who = f"client {empty[0]}" if len(empty) == 1 else f"clients {_listed(empty)}"
        raise ShardsError(
            f"{who} would have no rows (rows by client, from 0: {_listed(held.tolist())}); "
            "take another seed, a larger partition.alpha or fewer workers"
        )


def _listed(numbers: Sequence[int]) -> str:
    rest = len(numbers) - _MOST_TOLD
    return ", ".join(map(str, numbers[:_MOST_TOLD])) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class ShardCounts:
    """What a division comes to.

    alpha: None where none was drawn with. field: "" where rows have no label. by_client: rows of each client.
    by_label: of each label, the commonest first, the rows of each client.
    """

    method: str
    alpha: float | None
    field: str
    seed: int
    by_client: tuple[int, ...]
    by_label: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(
        cls, settings: Partition, owners: NDArray[np.int64], labels: Sequence[str] | None, clients: int, seed: int
    ) -> Self:
        """owners: what `divide` gave for these arguments."""
        held = Counter(zip(labels or (), owners.tolist(), strict=False))
        totals = Counter(labels or ())
        return cls(
            method=settings.method,
            alpha=settings.alpha if settings.method in _DRAWN else None,
            field=settings.field,
            seed=seed,
            by_client=tuple(np.bincount(owners, minlength=clients).tolist()),
            by_label={
                label: tuple(held[label, client] for client in range(clients))
                for label in sorted(totals, key=lambda label: (-totals[label], label))
            },
        )

    def came_of(self, settings: Partition, seed: int) -> bool:
        """Whether these settings and this seed could have made it."""
        alpha = settings.alpha if settings.method in _DRAWN else None
        made = (settings.method, settings.field, alpha, seed)
        return made == (self.method, self.field, self.alpha, self.seed)

    @property
    def rows(self) -> int:
        return sum(self.by_client)

    def summary(self) -> str:
        """One line: how the rows are divided, and how uneven the shards are."""
        way = (
            f"{self.method} by {shown_label(self.field, 64)}" if self.method in ("dirichlet", "field") else self.method
        )
        drawn = f", alpha {self.alpha:g}, seed {self.seed}" if self.alpha is not None else ""
        return (
            f"{way}{drawn}: {self.rows:,} rows for {len(self.by_client)} clients, "
            f"from {min(self.by_client):,} to {max(self.by_client):,} each"
        )

    def columns(self, most: int) -> list[tuple[str, tuple[int, ...]]]:
        """A name to show and the rows of each client, by label; with more than `most`, the last is the rest's sum."""
        columns = [(shown_label(label, _LONGEST_NAME), held) for label, held in self.by_label.items()]
        if len(columns) <= most:
            return columns
        rest = [held for _, held in columns[most - 1 :]]
        return [*columns[: most - 1], (OTHERS, tuple(map(sum, zip(*rest, strict=True))))]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Raises ValueError, KeyError or TypeError for anything else."""
        alpha = tree["alpha"]
        counts = cls(
            method=str(tree["method"]),
            alpha=None if alpha is None else float(alpha),
            field=str(tree["field"]),
            seed=int(tree["seed"]),
            by_client=tuple(map(int, tree["by_client"])),
            by_label={str(label): tuple(map(int, held)) for label, held in tree["by_label"].items()},
        )
        held = counts.by_client
        if not held or any(len(column) != len(held) for column in counts.by_label.values()):
            raise ValueError("not as many clients everywhere")
        return counts


def shown_label(name: str, longest: int) -> str:
    """As a cell of a table can hold it: of a long one both ends, as many begin alike and others end alike."""
    printable = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    if len(printable) <= longest:
        return printable
    end = (longest - 1) // 2
    return f"{printable[: longest - 1 - end]}…{printable[len(printable) - end :]}"
