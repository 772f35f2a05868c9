"""The keeper: has a worker's state written into its folder on a thread of its own, in the order in which it came about.

Neither the event loop nor training waits for the disk, but where training would change what is still being written
(`settle`). Since all of it is written in order, what is on disk is at any moment what the worker was at some moment
before. A disk that refuses is told once; nothing about the run depends on it, and each later round is tried again. One
that is slower than the rounds is taken to refuse, so that what waits for it does not fill the memory: unless it is
small, only what has landed before one round waits, and what one round has contributed.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import defaultdict, deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from parablock.conveyor import Conveyor
from workers.spill import StoredVector
from workers.state_folder import BLOCK, START, Position

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    import numpy.typing as npt

    from parablock.tensor_file import Reader, Tensors
    from workers.outbox import Encoding, Leaving
    from workers.spill import Spillable
    from workers.state_folder import Contribution, LandedBlock, State, StateFolder

    Vector = npt.NDArray[np.float32]

log = logging.getLogger("worker")

_SMALL_BYTES = 32 << 20
"""So much may wait to be written in any case."""


class _Backlog:
    """What waits to be written, by kind: before the end of which round it was told, and its bytes. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[str, deque[tuple[int, int]]] = defaultdict(deque)
        self._nbytes = 0

    def admit(self, kind: str, round: int, nbytes: int) -> bool:
        """Whether this may wait too, until it is `written`: none of its kind waits since an earlier round, or all that
        waits is small."""
        with self._lock:
            waiting = self._waiting[kind]
            if waiting and waiting[0][0] < round and self._nbytes + nbytes > _SMALL_BYTES:
                return False
            waiting.append((round, nbytes))
            self._nbytes += nbytes
            return True

    def written(self, kind: str) -> None:
        """The oldest of a kind waits no more."""
        with self._lock:
            self._nbytes -= self._waiting[kind].popleft()[1]


class Keeper:
    """See the module. call_soon, on_error: as `parablock.conveyor.Conveyor` has them; any thread may call the methods.

    state: what the folder holds already.
    """

    def __init__(
        self,
        folder: StateFolder,
        state: State | None,
        call_soon: Callable[[Callable[[], None]], object],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._folder = folder
        self._writing: dict[int, Future[None]] = {}  # by block, that of its optimizer's state
        self._told = 0  # rounds
        self._backlog = _Backlog()
        # What follows is the thread's.
        self._open: dict[int, int] = {}  # by round, the blocks of contributions that are on disk
        self._residuals: dict[int, int] = {}  # by block, the round through which that on disk goes
        self._optimizer: dict[int, int] = {}  # likewise
        if state is not None and state.position is not None:
            self._open = {round: spooled.made.block for round, spooled in state.contributions.items()}
            self._residuals = {block: state.position.residuals[block] for block in state.residuals}
            self._optimizer = {block: state.position.optimizer[block] for block in state.optimizer}
        self._refused = False  # the disk has, and it was told
        self._whole = True  # nothing was refused since the last position
        self._given_up = False
        self.written = 0
        self._conveyor: Conveyor[None] = Conveyor("state", call_soon, on_result=lambda _: None, on_error=on_error)

    def landed(self, landed: LandedBlock, values: Vector, done: Callable[[], None] | None = None) -> None:
        """A block has landed. values: nobody changes them before `done` is called, on the thread; where the disk is too
        slow for them, here and now."""
        if self._backlog.admit("landed", self._told, values.nbytes):
            self._put(partial(self._landed, landed, values), self._written("landed", done))
        else:
            self._put(self._refuse)
            if done is not None:
                done()

    def dropped(self, round: int) -> None:
        """Nothing stands in the model for this round any more."""
        self._put(partial(self._drop, lambda number, _block: number == round))

    def closed(self, before: int, but: Collection[int]) -> None:
        """Of rounds before `before` nothing will be heard any more, but of some."""
        self._put(partial(self._drop, lambda number, _block: number < before and number not in but))

    def contributed(
        self,
        made: Contribution,
        delta: Leaving,
        encoded: Future[Encoding] | None,
        start: Spillable | None = None,
        stored: Callable[[Reader], None] | None = None,
    ) -> None:
        """A round was trained. encoded: what a lossy codec makes of it, when it has. start: what the block was before,
        spilled when it is on disk. stored: called on the thread with the contribution's file. Neither happens where the
        disk refuses."""
        vectors = 1 if encoded is None else 2  # with its residual
        if self._backlog.admit("contributed", self._told, vectors * 4 * delta.numel):
            self._put(partial(self._contributed, made, delta, encoded, start, stored), self._written("contributed"))
        else:
            self._put(partial(self._refuse, self._residuals, made.block))

    def learnt(self, block: int, round: int, state: Callable[[], Tensors | None]) -> None:
        """What the optimizer knows of a block after this round; None: nothing any more. state: asked for it on the
        thread, as it may be on its way from the device."""
        if not self._backlog.admit("learnt", self._told, 0):  # bytes of its own it has none
            self._put(partial(self._refuse, self._optimizer, block))
            return
        done = self._writing[block] = Future()
        written = self._written("learnt", lambda: done.set_result(None))
        self._put(partial(self._learnt, block, round, state), written)

    def settle(self, blocks: Iterable[int]) -> None:
        """Wait until what `learnt` was given of these blocks may be changed."""
        for block in blocks:
            if (writing := self._writing.pop(block, None)) is not None:
                writing.result()

    def moved_on(self, round: int, surplus: int, clients: int, *, astray: bool) -> None:
        """All before `round` is behind, and everything about it was told here."""
        self._told += 1
        position = Position(round, surplus, astray, clients)
        self._put(partial(self._moved_on, position))

    def close(self) -> None:
        """Write all that was told, and let the folder go."""
        done = threading.Event()
        self._conveyor.put(done.set)
        done.wait()
        self._conveyor.close()
        self._folder.close()

    def remove(self) -> None:
        """The run is done: remove the folder as well as all in it. Before `close`."""
        self._conveyor.put(self._remove)

    def _written(self, kind: str, done: Callable[[], None] | None = None) -> Callable[[], None]:
        def written() -> None:
            self._backlog.written(kind)
            if done is not None:
                done()

        return written

    # On the thread

    def _refuse(self, rounds: dict[int, int] | None = None, block: int = -1) -> int:
        """rounds: what is on disk of the block does not hold any more."""
        if rounds is not None:
            rounds.pop(block, None)
        raise OSError(errno.ETIMEDOUT, "the disk is slower than the rounds")

    def _put(self, job: Callable[[], int], done: Callable[[], None] | None = None) -> None:
        self._conveyor.put(partial(self._do, job, done))

    def _do(self, job: Callable[[], int], done: Callable[[], None] | None) -> None:
        try:
            if not self._given_up:
                self.written += job()
        except OSError as error:
            self._whole = False
            if not self._refused:
                self._refused = True
                log.error(
                    "cannot write the worker's state into %s: %s; the run goes on, but should this process end, a new "
                    "one has to begin further back. Make room, and it is written again",
                    self._folder.path,
                    error.strerror or error,
                )
        except BaseException:
            self._given_up = True  # what follows would claim that this was done
            raise
        finally:
            if done is not None:
                done()

    def _landed(self, landed: LandedBlock, values: Vector) -> int:
        written = self._folder.write_block(landed, values)
        self._drop(lambda round, block: block == landed.block and round <= landed.round)
        return written

    def _drop(self, which: Callable[[int, int], bool]) -> int:
        for round in [round for round, block in self._open.items() if which(round, block)]:
            self._folder.drop_contribution(round)
            del self._open[round]
        return 0

    def _contributed(
        self,
        made: Contribution,
        delta: Leaving,
        encoded: Future[Encoding] | None,
        start: Spillable | None,
        stored: Callable[[Reader], None] | None,
    ) -> int:
        values, chunks, written = delta.wait(), [], 0
        if encoded is not None:
            encoding = encoded.result()
            chunks = [np.frombuffer(chunk.payload, np.uint8) for chunk in encoding.chunks]
            if encoding.residual is not None:
                self._residuals.pop(made.block, None)  # an older one would be wrong, should this one not be written
                written += self._folder.write_residual(made.block, made.round, encoding.residual)
                self._residuals[made.block] = made.round
        there = None if start is None else self._landed_as(made.block, start.wait())
        before = None if start is None or there is not None else start.wait()
        written += self._folder.write_contribution(made, values, chunks, before)
        self._open[made.round] = made.block
        if start is not None:
            start.spill(there or StoredVector(self._folder.open_contribution(made.round), START))
        if stored is not None:
            stored(self._folder.open_contribution(made.round))
        return written

    def _landed_as(self, block: int, values: Vector) -> StoredVector | None:
        """These values, where the file of the block as it landed holds just them."""
        file = self._folder.open_block(block)
        return StoredVector(file, BLOCK) if file is not None and file.holds(BLOCK, values) else None

    def _learnt(self, block: int, round: int, state: Callable[[], Tensors | None]) -> int:
        self._optimizer.pop(block, None)
        if (learnt := state()) is None:
            return 0
        written = self._folder.write_optimizer(block, round, learnt)
        self._optimizer[block] = round
        return written

    def _moved_on(self, position: Position) -> int:
        named = replace(
            position,
            contributions=dict(self._open),
            residuals=dict(self._residuals),
            optimizer=dict(self._optimizer),
        )
        written = self._folder.write_position(named)
        if self._refused and self._whole:
            self._refused = False
            log.warning("the worker's state is written into %s again", self._folder.path)
        self._whole = True
        return written

    def _remove(self) -> None:
        self._given_up = True
        with suppress(FileNotFoundError):
            self._folder.remove()
