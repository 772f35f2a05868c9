"""The broker: performs the coordinator's effects on a ROUTER socket, a fold executor, and a run's folder.

    frames ──decode──▸ coordinator ──effects──▸ socket, fold executor, record, view
                          ▴   ▴                        │
                          │   └──── Folded, Unfit ─────┘
                          └── Tick, at the coordinator's own deadline

The event loop never folds and never writes a block: one thread does, in the order in which rounds close.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from broker.blocks import BaseModel, GlobalBlocks
from broker.record import Record
from broker.view import View
from parablock import wire
from parablock.coordinator import Coordinator
from parablock.coordinator_events import (
    Committed,
    Event,
    Fold,
    Folded,
    Malformed,
    Note,
    Over,
    Received,
    Reported,
    Send,
    Stop,
    Tick,
)
from parablock.messages import Heartbeat

if TYPE_CHECKING:
    from broker.socket import RouterSocket
    from parablock.config import Config
    from parablock.run_folder import RunFolder

log = logging.getLogger("broker")

_DISK_RETRY_S = 5.0

_ENDINGS = frozenset({"left", "lost", "replaced", "refused", "dropped", "rejoining", "behind"})
"""Kinds of `Note` after which a client is no longer on the roster."""


class Broker:
    """One run, from the first worker to the last. `run` returns whether it was completed, and why it ended."""

    def __init__(
        self, config: Config, base: BaseModel, folder: RunFolder, socket: RouterSocket, run: str, epoch: int
    ) -> None:
        began = time.monotonic()
        self._coordinator = Coordinator(config, base.manifest, base.weights, base.tokenizer, run, epoch)
        self._blocks = GlobalBlocks(base, config.server, folder)
        self._record = Record(folder, base.manifest, began)
        self._view = View(config, base.manifest)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fold")
        self._folds: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._over: asyncio.Future[Over] = asyncio.get_running_loop().create_future()
        self._clients: set[str] = set()
        self._socket = socket
        socket.listen(self._on_frames)

    def say(self, text: str) -> None:
        self._view.say(text)

    async def run(self) -> Over:
        """Raises whatever failed in a callback of the loop or in a fold: a bug of ours ends the broker, loudly."""
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: self._fail(context))
        self._view.start()
        try:
            over = await self._over
        except Exception:
            self._handle(Stop("the broker failed"))  # so that no worker waits for it
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for fold in self._folds:
                fold.cancel()
            await asyncio.gather(*self._folds, return_exceptions=True)
            self._executor.shutdown(wait=True)
            self._record.close()
            self._show()
            self._view.close()
            self._socket.close()
        return over

    def stop(self, reason: str) -> None:
        """End the run although it is not complete: every client is told."""
        self._handle(Stop(reason))

    def _fail(self, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        if self._over.done():
            log.error("after the end of the run: %s", context.get("message", error), exc_info=error)
        else:
            self._over.set_exception(error)

    def _on_frames(self, peer: bytes, frames: list[memoryview]) -> None:
        try:
            envelope = wire.decode(frames)
        except wire.WireError as error:
            self._handle(Malformed(peer, str(error)))
        else:
            self._handle(Received(peer, envelope))

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        for effect in self._coordinator.handle(event, now):
            match effect:
                case Send(peer, envelope):
                    if not self._socket.send(peer, wire.encode(envelope)):
                        log.debug("a %s to a peer that is gone", type(envelope.message).__name__)
                case Fold():
                    task = asyncio.get_running_loop().create_task(self._fold(effect))
                    self._folds.add(task)
                    task.add_done_callback(self._fold_ended)
                case Committed():
                    self._record.committed(effect, self._coordinator.members(effect.round), now)
                    self._view.committed(effect.round)
                case Reported(client, message):
                    if isinstance(message, Heartbeat):
                        self._view.heartbeat(client, message)
                    self._record.reported(effect, self._clients, now)
                    self._show()
                case Note():
                    self._note(effect, now)
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
        self._view.say(f"{note.client or 'a stranger'} {note.kind}: {note.text}")

    async def _fold(self, fold: Fold) -> None:
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        event = await loop.run_in_executor(self._executor, self._blocks.fold, fold)
        if isinstance(event, Folded):
            while True:
                try:
                    await loop.run_in_executor(self._executor, self._blocks.store, fold)
                    break
                except OSError as error:  # nothing was announced yet, so nothing is lost by waiting for room
                    self.say(f"cannot store round {fold.round}: {error}; trying again in {_DISK_RETRY_S:g} s")
                    await asyncio.sleep(_DISK_RETRY_S)
        self._record.folded(fold.round, began, time.monotonic())
        self._handle(event)

    def _fold_ended(self, task: asyncio.Task[None]) -> None:
        self._folds.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail({"message": "a fold failed", "exception": error})

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._coordinator.deadline()
        if deadline is not None and not self._over.done():
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(deadline - now, 0.0) + 1e-3, lambda: self._handle(Tick()))
