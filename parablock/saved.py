"""What of a run outlives the broker's process: what each commit adds to the journal, and what is read back from it.

An `Entry` is made durable before its commit is announced (`parablock.coordinator_events.Store`), together with the new
version of its block. `Saved` is the state after the last entry; a broker that begins with it goes on with round
`next_round` as if nothing had happened, under the next epoch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from parablock.wire import Buffer


EVERYBODY = "*"
"""In `Entry.charged`: every client, be it one of which no entry tells. No client has this name."""


@dataclass(frozen=True)
class Entry:
    """One committed round.

    attempt: the fold that made the block's new version; 0: nobody was counted, and the block stays as it was, or goes
    back to an older version where a damaged one is repaired (`broker.opening`). base: the round that made the version
    before, −1 where none did. contributors: in roster order, with their weights, steps and losses. moved: root mean
    square of x' − x; 0 where the settings have no use for it. agenda: `Agenda.snapshot` after this commit. clients:
    names on the roster. tardy: of those, who was not in time for their last round. folded_late: what was counted beside
    the contributors' own, as CLIENT@ROUND. left_out, clipped: as in `coordinator_events.Committed`. charged: whose
    data have had a part in it (`parablock.ledger`), where that is counted; `EVERYBODY` where nothing tells.
    """

    round: int
    block: int
    attempt: int
    base: int
    contributors: tuple[str, ...]
    weights: tuple[int, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    moved: float
    late: int
    bytes_up: int
    bytes_down: int
    reason: str
    agenda: Mapping[str, Any]
    clients: tuple[str, ...]
    tardy: tuple[str, ...]
    folded_late: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()
    charged: tuple[str, ...] = ()

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of all that the block's new version is made of, in the order of the fold."""
        return (*self.contributors, *self.folded_late)

    @property
    def late_parts(self) -> tuple[tuple[str, int], ...]:
        """Of what was counted late: whose it is, and the round that it was made for."""
        parts = (part.rpartition("@") for part in self.folded_late)
        return tuple((client, int(round)) for client, _, round in parts)

    @property
    def loss(self) -> float | None:
        """Weighted mean over the contributors; None without any, or where they do not tell it."""
        if not self.losses:
            return None
        shares = zip(self.losses, self.weights, strict=True)
        return sum(loss * weight for loss, weight in shares) / sum(self.weights)


def recent(entries: Iterable[Entry], in_flight: int) -> tuple[str, ...]:
    """Who may have given to the rounds that were open when a broker ended, whose entries these are: who was there when
    the first of them could be trained, or since. With `EVERYBODY` where no row tells who was there when the run began;
    that alone where a row is lost, or is charged so, and with it is lost who was drawn."""
    newest = deque(entries, maxlen=in_flight + 1)
    names = {name for entry in newest for name in (*entry.clients, *entry.charged)}
    rounds = range(max(newest[-1].round - in_flight, 0), newest[-1].round + 1)
    if EVERYBODY in names or [entry.round for entry in newest] != list(rounds):
        return (EVERYBODY,)
    return tuple(sorted(names | {EVERYBODY} if len(newest) <= in_flight else names))


def spent(last: Entry, round: int, block: int, reason: str, base: int = -1, charged: tuple[str, ...] = ()) -> Entry:
    """The entry of a round that was not held, or of which nothing is known: who is there and whose turn it is stay as
    they were after the `last` one."""
    return replace(
        last,
        round=round,
        block=block,
        attempt=0,
        base=base,
        contributors=(),
        weights=(),
        steps=(),
        losses=(),
        moved=0.0,
        late=0,
        bytes_up=0,
        bytes_down=0,
        reason=reason,
        folded_late=(),
        left_out=(),
        clipped=(),
        charged=charged,
    )


@dataclass(frozen=True)
class SavedVersion:
    """The newest version of a block that some round has made. counted: as `Entry.counted`.

    values: the whole block, float32 bytes that nobody changes any more.
    """

    block: int
    round: int
    base: int
    counted: tuple[str, ...]
    values: Buffer


@dataclass(frozen=True)
class Saved:
    """The state after the last entry of a journal. versions: of the blocks that are not as in the base model.

    folded_late: by client, the round of its newest contribution that was counted late, and the one it was counted in.
    recent: who may have given to rounds that were open. charged: to how many rounds each client has given
    (`parablock.ledger`), to which `untold` are to be added, and of a client that is not named only those are known.
    """

    next_round: int
    versions: tuple[SavedVersion, ...] = ()
    agenda: Mapping[str, Any] = field(default_factory=dict)
    clients: tuple[str, ...] = ()
    tardy: tuple[str, ...] = ()
    folded_late: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    recent: tuple[str, ...] = ()
    charged: Mapping[str, int] = field(default_factory=dict)
    untold: int = 0
