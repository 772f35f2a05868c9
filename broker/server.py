"""The broker: performs the coordinator's effects on a ROUTER socket, the fold's and the disk's threads, and a folder.

    frames ──decode──▸ coordinator ──effects──▸ socket, fold, disk, record, view
                          ▴   ▴                             │
                          │   └─ Measured, Folded, Unfit, Stored
                          └── Tick, at the coordinator's own deadline

The event loop never folds and never writes a block: one thread folds and one writes, each in the order in which it is
asked to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from broker import guard
from broker.blocks import GlobalBlocks, Made
from broker.record import Record
from broker.store import BlockStore
from broker.view import View
from parablock import wire
from parablock.block_file import BLOCK
from parablock.conveyor import Conveyor
from parablock.coordinator import Coordinator
from parablock.coordinator_events import (
    Committed,
    Drop,
    Event,
    Fold,
    Malformed,
    Measure,
    Measured,
    Note,
    Over,
    Received,
    Reported,
    Revoked,
    Send,
    Stop,
    Store,
    Stored,
    Tick,
    Unfit,
)
from parablock.measurement import Measurement
from parablock.messages import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from broker.opening import Opened
    from broker.socket import RouterSocket

    Vector = npt.NDArray[np.float32]

log = logging.getLogger("broker")

_DISK_RETRY_S = 5.0

_ENDINGS = frozenset({"left", "lost", "replaced", "refused", "dropped", "rejoining", "behind", "revoked"})
"""Kinds of `Note` after which a client is no longer on the roster."""

_OWN = frozenset({"restarted", "repaired", "quorum", "drawn"})
"""Kinds of `Note` that are about the broker itself."""


@dataclass(frozen=True)
class _Kept:
    """A round that is to be made durable, or was. trouble: why it is not yet.

    tensors: by name of the tensor in the block's file; None where nobody was counted.
    """

    store: Store
    tensors: Mapping[str, Vector] | None
    trouble: OSError | None = None


def _commit(store: BlockStore, kept: _Kept) -> _Kept:
    """On the disk's thread."""
    try:
        store.commit(kept.store, kept.tensors)
    except OSError as error:
        return dataclasses.replace(kept, trouble=error)
    return kept


class Broker:
    """One run, from the first worker to the last. `run` returns whether it was completed, and why it ended."""

    def __init__(self, opened: Opened, socket: RouterSocket) -> None:
        """Takes over the blocks of `opened`, and makes the epoch durable. Raises OSError where the disk refuses."""
        config, folder, base, journal = opened.config, opened.folder, opened.base, opened.journal
        resumed, began = opened.resumed, opened.began(time.monotonic())
        epoch, saved = opened.begin_epoch(began), opened.saved
        self._coordinator = Coordinator(
            config, base.manifest, base.weights, base.tokenizer, journal.facts.run, epoch, saved
        )
        self._blocks = GlobalBlocks(base, config)
        self._measurement = Measurement(config, base.manifest)
        while opened.stored:  # nobody else shall hold on to them
            self._blocks.restore(opened.stored.pop())
        self._store = BlockStore(folder.blocks, journal, journal.facts.run, base.manifest.digest, config.journal.keep)
        self._record = Record(folder, base.manifest, config, began, opened.rows, journal.entries() if resumed else ())
        opened.rows.clear()  # nor on to these
        self._view = View(config, base.manifest, self._coordinator.block)
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        self._fold: Conveyor[Made | Measured | Unfit] = Conveyor("fold", call_soon, self._folded, self._failed)
        self._disk: Conveyor[_Kept] = Conveyor("disk", call_soon, self._kept, self._failed)
        self._folding: dict[int, float] = {}  # by round: when its first chunk was folded
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._over: asyncio.Future[Over] = asyncio.get_running_loop().create_future()
        self._clients: set[str] = set()
        self._socket = socket
        if resumed:
            if journal.next_round:
                self._view.committed(journal.next_round - 1)
            self._note(Note("restarted", "", f"as epoch {epoch}, from round {journal.next_round}"), time.monotonic())
        for text in opened.said:
            self._note(Note("repaired", "", text), time.monotonic())
        socket.listen(self._on_frames, self._on_broken, config.network.window_bytes, config.round.clients)
        if not guard.WATCHES:
            self.say(
                "this system does not tell how much has come of a connection: messages without an end go unnoticed"
            )
        if socket.door is not None:
            socket.door.listen(
                lambda client: call_soon(self._handle, Revoked(client)),
                lambda text: call_soon(self.say, text),
                lambda error: call_soon(self._fail, {"message": "the door failed", "exception": error}),
            )
            for client in sorted(set(self._coordinator.expected) - set(socket.door.clients)):  # revoked meanwhile
                self._handle(Revoked(client))

    def say(self, text: str) -> None:
        self._view.say(text)

    @property
    def epsilon(self) -> float | None:
        """What the run has cost so far (`parablock.ledger`); None where nobody is protected."""
        return self._record.epsilon

    async def run(self) -> Over:
        """Raises whatever failed in a callback of the loop or in a fold: a bug of ours ends the broker, loudly."""
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: self._fail(context))
        self._view.start()
        self._handle(Tick())
        try:
            over = await self._over
        except Exception:
            self._handle(Stop("the broker failed", returns=True))
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._fold.close()
            self._disk.close()
            self._store.close()
            self._record.close()
            self._show()
            self._view.close()
            self._socket.close()
        return over

    def stop(self, reason: str) -> None:
        """End this broker although the run is not complete: every client is told, and waits for the next one."""
        self._handle(Stop(reason, returns=True))

    def _fail(self, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        if self._over.done():
            log.error("after the end of the run: %s", context.get("message", error), exc_info=error)
        else:
            self._over.set_exception(error)

    def _on_frames(self, peer: bytes, frames: list[memoryview], client: str | None) -> None:
        try:
            envelope = wire.decode(frames)
        except wire.WireError as error:
            self._handle(Malformed(peer, str(error), client))
        else:
            self._handle(Received(peer, envelope, client))

    def _on_broken(self, peer: bytes, reason: str, client: str | None) -> None:
        self._handle(Malformed(peer, reason, client))

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        for effect in self._coordinator.handle(event, now):
            match effect:
                case Send(peer, envelope):
                    if not self._socket.send(peer, envelope.frames):
                        log.debug("a %s to a peer that is gone", type(envelope.message).__name__)
                case Measure():
                    self._fold.put(partial(self._measurement.take, effect))
                case Fold():
                    self._folding.setdefault(effect.round, now)
                    self._fold.put(partial(self._blocks.fold, effect))
                case Store():
                    self._keep(_Kept(effect, self._blocks.tensors(effect) if effect.attempt else None))
                case Committed():
                    self._folding.pop(effect.round, None)
                    self._record.committed(effect, self._coordinator.members(effect.round), now)
                    self._view.committed(effect.round)
                case Reported(client, message):
                    if isinstance(message, Heartbeat):
                        self._view.heartbeat(client, message)
                    self._record.reported(effect, self._clients, now)
                    self._show()
                case Note():
                    self._note(effect, now)
                case Drop(peer, _, client, seconds):
                    self._socket.drop(peer, client)
                    if client is not None and seconds:
                        assert self._socket.door is not None
                        self._socket.door.bar(client, now + seconds)
                case Over():
                    if not self._over.done():
                        self._over.set_result(effect)
        self._set_timer(now)

    def _show(self) -> None:
        """Pass what the record has completed on to the view."""
        rows, self._record.fresh = self._record.fresh, []
        for row in rows:
            self._view.show(row)

    def _note(self, note: Note, now: float) -> None:
        self._record.note(note, now)
        if note.kind == "joined":
            self._clients.add(note.client)
            self._view.joined(note.client)
        elif note.kind == "started":
            self._view.began()
        elif note.kind in _ENDINGS and note.client:
            self._clients.discard(note.client)
            self._record.gone(note.client)
            self._view.gone(note.client)
        if note.told:
            whom = "the broker" if note.kind in _OWN else note.client or "a stranger"
            self._view.say(f"{whom} {note.kind}: {note.text}")

    def _folded(self, made: Made | Measured | Unfit) -> None:
        if not isinstance(made, Made):
            self._handle(made)
            return
        answer = made.answer
        self._disk.put(partial(self._store.write, answer.round, answer.attempt, made.block, made.numel, made.parts))
        self._handle(answer)

    def _keep(self, kept: _Kept) -> None:
        self._disk.put(partial(_commit, self._store, kept))

    def _kept(self, kept: _Kept) -> None:
        store = kept.store
        if kept.trouble is not None:  # nothing was announced yet, so nothing is lost by waiting for room
            self.say(f"cannot store round {store.round}: {kept.trouble}; trying again in {_DISK_RETRY_S:g} s")
            asyncio.get_running_loop().call_later(_DISK_RETRY_S, self._keep, dataclasses.replace(kept, trouble=None))
            return
        values = None
        if kept.tensors is not None:
            self._fold.put(partial(self._blocks.settle, store))  # before any fold that builds on it
            self._record.folded(store.round, self._folding[store.round], time.monotonic())
            values = kept.tensors[BLOCK].data.cast("B")
        self._handle(Stored(store.round, store.attempt, values))

    def _failed(self, error: BaseException) -> None:
        self._fail({"message": "a fold failed", "exception": error})

    def _set_timer(self, now: float) -> None:
        deadline = self._coordinator.deadline()
        if self._timer is not None:
            if deadline is not None and self._timer_due <= deadline and not self._over.done():
                return  # it looks again when it goes off
            self._timer.cancel()
            self._timer = None
        if deadline is not None and not self._over.done():
            self._timer_due = deadline
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(deadline - now, 0.0) + 1e-3, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._handle(Tick())
