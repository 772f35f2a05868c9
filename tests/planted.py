"""Bugs to plant: each is one that a protocol like this one may well have, put into the real class in its place.

    python -m tests.planted                              the first history that catches each bug, and by what
    python -m tests.planted stale_epoch_at_a_worker --seed 50 --count 1

A bug is caught where an invariant of `tests.network` breaks, or the history does not end well; that the machine fails
by itself, by an exception of its own, does not count.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from broker.blocks import GlobalBlocks
from broker.store import BlockStore
from parablock.agenda import Agenda
from parablock.arrivals import Arrivals
from parablock.block_file import BLOCK, RESIDUAL
from parablock.collection import Collection
from parablock.coordinator import Coordinator
from parablock.downloads import Downloads
from parablock.folding import Folding
from parablock.latecomers import Latecomers
from parablock.messages import Commit
from parablock.open_rounds import OpenRounds
from parablock.participant import Participant
from parablock.quorum import Quorum
from parablock.transfer import Incoming
from parablock.uploads import Uploads
from tests import network
from tests.histories import history, outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Plant = Callable[[pytest.MonkeyPatch], None]


class Bug(NamedTuple):
    """seed: of a history that catches it. about: what is wrong with it."""

    about: str
    plant: Plant
    seed: int


SEARCHED = 500
"""Histories in which a bug must be found."""

BUGS: dict[str, Bug] = {}


def _nothing(*_: object) -> None:
    """In place of what would be done."""


def bug(about: str, seed: int) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        BUGS[plant.__name__.strip("_")] = Bug(about, plant, seed)
        return plant

    return add


@bug("the broker says that a round is stored, and makes it durable when the next one is", seed=0)
def _acknowledge_before_fsync(patch: pytest.MonkeyPatch) -> None:
    commit = BlockStore.commit

    def behind(self: Any, store: Any, tensors: Any) -> None:
        due, self._due = getattr(self, "_due", None), (store, tensors)
        if due is not None:
            self._named = True
            commit(self, *due)

    patch.setattr(BlockStore, "commit", behind)


@bug("a round is announced as soon as it is folded, while the disk still writes", seed=0)
def _announce_before_it_is_stored(patch: pytest.MonkeyPatch) -> None:
    store = Collection._store

    def at_once(self: Any, round: Any) -> None:
        store(self, round)
        attempt = round.attempt
        values = None if attempt is None else memoryview(b"".join(c.payload for c in attempt.shipment.payload.chunks))
        self.stored(round.number, round.entry.attempt, values, 0.0)

    patch.setattr(Collection, "_store", at_once)


@bug("what is sent again of a contribution is taken again", seed=1)
def _double_fold_on_resend(patch: pytest.MonkeyPatch) -> None:
    take = Incoming.take

    def again(self: Any, offset: int, payload: Any) -> bool:
        return take(self, offset, payload) or offset < self.held

    patch.setattr(Incoming, "take", again)


@bug("a contribution that has counted, and is offered again, is taken for a late one", seed=433)
def _counted_late_as_well(patch: pytest.MonkeyPatch) -> None:
    settle = Latecomers.settle

    def owed_by_all(self: Any, round: Any, members: Any, parts: Any) -> None:
        settle(self, round, members, parts)
        self._late._visits[round.block][-1][1].update(round.done)

    patch.setattr(Latecomers, "settle", owed_by_all)


@bug("the broker takes what was said to an earlier one", seed=9)
def _stale_epoch_at_the_broker(patch: pytest.MonkeyPatch) -> None:
    receive = Coordinator._receive

    def any_epoch(self: Any, peer: bytes, client: str | None, envelope: Any, now: float) -> None:
        receive(self, peer, client, replace(envelope, epoch=self._epoch), now)

    patch.setattr(Coordinator, "_receive", any_epoch)


@bug("a worker takes what an earlier broker has said", seed=166)
def _stale_epoch_at_a_worker(patch: pytest.MonkeyPatch) -> None:
    receive = Participant._receive

    def any_epoch(self: Any, envelope: Any, now: float) -> None:
        stale = envelope.epoch < self._epoch
        receive(self, replace(envelope, epoch=self._epoch) if stale else envelope, now)

    patch.setattr(Participant, "_receive", any_epoch)


@bug("a worker takes over what an attempt has made when all of it is there, whatever the commit will say", seed=0)
def _apply_before_commit(patch: pytest.MonkeyPatch) -> None:
    take = Arrivals.take

    def at_once(self: Any, chunk: Any, payload: Any, now: float) -> None:
        take(self, chunk, payload, now)
        download = self._downloads._now.get(chunk.round)
        if download is not None and download.incoming.done and download.commit is None:
            nbytes = download.incoming.nbytes
            commit = Commit(chunk.round, chunk.block, chunk.attempt, -1, nbytes, 1, True)
            if self._downloads.commit(commit, self._layout(chunk.block, chunk.attempt), nbytes, now):
                self._arrived(commit, now)

    patch.setattr(Arrivals, "take", at_once)


def _by_wall_clock(machine: type, patch: pytest.MonkeyPatch) -> None:
    handle, deadline = machine.handle, machine.deadline  # type: ignore[attr-defined]

    def by_wall_clock(self: Any, event: Any, now: float) -> Any:
        self._ahead = time.time() - now
        return handle(self, event, time.time())

    def due(self: Any) -> float | None:
        when = deadline(self)
        return None if when is None else when - getattr(self, "_ahead", 0.0)

    patch.setattr(machine, "handle", by_wall_clock)
    patch.setattr(machine, "deadline", due)


@bug("the broker's timers go by the wall clock", seed=3)
def _wall_clock_at_the_broker(patch: pytest.MonkeyPatch) -> None:
    _by_wall_clock(Coordinator, patch)


@bug("a worker's timers go by the wall clock", seed=0)
def _wall_clock_at_a_worker(patch: pytest.MonkeyPatch) -> None:
    _by_wall_clock(Participant, patch)


@bug("a restart forgets what the way down's codec has lost so far", seed=30)
def _lost_residual_on_restart(patch: pytest.MonkeyPatch) -> None:
    restore = GlobalBlocks.restore

    def without(self: Any, stored: Any) -> None:
        kept = {name: vector for name, vector in stored.tensors.items() if name != RESIDUAL}
        restore(self, replace(stored, tensors=kept))

    patch.setattr(GlobalBlocks, "restore", without)


@bug("a restart forgets the server optimizer's moments", seed=17)
def _lost_server_state_on_restart(patch: pytest.MonkeyPatch) -> None:
    restore = GlobalBlocks.restore

    def without(self: Any, stored: Any) -> None:
        kept = {name: vector for name, vector in stored.tensors.items() if name in (BLOCK, RESIDUAL)}
        restore(self, replace(stored, tensors=kept))

    patch.setattr(GlobalBlocks, "restore", without)


@bug("a restart decides anew what was decided, and told, before", seed=10)
def _agenda_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Agenda, "restore", _nothing)


@bug("an upload that is withheld by a client that is heard is waited for", seed=7)
def _reservation_never_reclaimed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Uploads, "reclaim", _nothing)


@bug("contributions are folded in the order in which they came", seed=0)
def _roster_order_by_arrival(patch: pytest.MonkeyPatch) -> None:
    begin = Folding.begin

    def by_arrival(self: Any, round: Any, clients: tuple[str, ...], now: float) -> None:
        begin(self, round, tuple(name for name in round.uploads if name in clients), now)

    patch.setattr(Folding, "begin", by_arrival)


@bug("a worker goes on, at another broker, with what the one before has sent it of an attempt", seed=214)
def _attempts_mixed_across_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Downloads, "forget", _nothing)


@bug("a client that is lost while a round is open is not charged for it", seed=3)
def _lost_client_not_charged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OpenRounds, "part_from", _nothing)


@bug("a restart forgets who may have given to the rounds that were open", seed=30)
def _recent_clients_not_charged(patch: pytest.MonkeyPatch) -> None:
    restore = Collection.restore
    patch.setattr(Collection, "restore", lambda self, saved: restore(self, replace(saved, recent=())))


@bug("a run stops as soon as its quorum is missing, whatever time it is given", seed=10)
def _stops_at_once(patch: pytest.MonkeyPatch) -> None:
    init = Quorum.__init__
    patch.setattr(Quorum, "__init__", lambda self, policy, size: init(self, replace(policy, quorum_lost_s=1e-3), size))


@bug("a restarted broker misses its quorum before anybody can have come back", seed=10)
def _missed_at_once_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quorum, "expect", _nothing)


class Caught(NamedTuple):
    """How a bug was found. seed: of the first history that does, −1 for none. by: the invariant. failed: histories
    before in which the machine failed by itself. seconds: of processor time."""

    bug: str
    seed: int
    by: str
    failed: int
    seconds: float

    def __str__(self) -> str:
        if self.seed < 0:
            return f"{self.bug}: not caught in {self.seconds:.1f} s; {self.failed} histories failed otherwise"
        line = f"python -m tests.planted {self.bug} --seed {self.seed}"
        return f"{self.bug}: caught by history {self.seed} after {self.seconds:.1f} s: {self.by}\n    {line}"


def broken(seed: int) -> str:
    """The invariant that breaks in a history; empty where it ends well. Raises whatever else goes wrong in it."""
    try:
        outcome(history(seed))
    except AssertionError as error:
        *_, where = traceback.extract_tb(error.__traceback__)
        if Path(where.filename) != Path(network.__file__):
            raise
        return str(error).partition("\n")[0] or str(where.line)
    return ""


def search(name: str, seeds: Iterable[int]) -> Caught:
    """Plant a bug, and look for the first history that catches it."""
    began, failed = time.process_time(), 0
    with pytest.MonkeyPatch.context() as patch:
        BUGS[name].plant(patch)
        for seed in seeds:
            try:
                by = broken(seed)
            except Exception:
                failed += 1
                continue
            if by:
                return Caught(name, seed, by, failed, time.process_time() - began)
    return Caught(name, -1, "", failed, time.process_time() - began)


def _quiet() -> None:
    logging.getLogger("broker").setLevel(logging.ERROR)  # that the disk refuses is no news


def searches(names: Iterable[str], seeds: Sequence[int]) -> Iterator[Caught]:
    """All of them, each in a process of its own kind, on all cores."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(initializer=_quiet, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(partial(search, seeds=seeds), names)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bugs", nargs="*", metavar="BUG", help=f"of {', '.join(BUGS)}; by default each of them")
    parser.add_argument("--seed", type=int, default=0, help="the first history")
    parser.add_argument("--count", type=int, default=SEARCHED, help="how many at most")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.bugs) - BUGS.keys())
    if unknown:
        parser.error(f"no such bug: {', '.join(unknown)}; there are {', '.join(BUGS)}")
    missed = 0
    for caught in searches(options.bugs or list(BUGS), range(options.seed, options.seed + options.count)):
        print(caught, flush=True)
        missed += caught.seed < 0
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
