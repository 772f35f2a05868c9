"""The outbox: contributions on their way from the torch thread to the link, encoded chunk by chunk on a thread.

The first chunks travel while the later ones are being encoded, and training goes on meanwhile. What a lossy codec
rounds away is kept here, a residual per block, and added to the block's next contribution. Each contribution leaves a
residual of its own, which is not changed any more, so that it can be kept on disk meanwhile. What is there is let go of
here, and read back on the thread, chunk by chunk, as it is asked for. Knows no message.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from parablock import feedback
from parablock.conveyor import Conveyor
from parablock.layout import Layout
from parablock.transfer import Encoded
from workers.spill import StoredVector
from workers.state_folder import DELTA, DiskError, chunk_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from parablock.config import Config
    from parablock.tensor_file import Reader
    from parablock.transfer import Stored
    from parablock.wire import Buffer
    from workers.spill import Spillable

    Vector = npt.NDArray[np.float32]


class Leaving(Protocol):
    """A delta that may still be on its way from the device, as `parablock.staging.Outgoing` is."""

    @property
    def numel(self) -> int: ...

    def wait(self) -> Vector:
        """float32 of shape (numel,), which nobody changes any more; the same memory each time."""


@dataclass
class Encoding:
    """What noise or a lossy codec has made of a contribution. residual: what the next one has to make up for."""

    chunks: list[Encoded] = field(default_factory=list)
    residual: Vector | None = None


@dataclass(frozen=True)
class _Job:
    """A contribution on the thread. done: what it was made into, where whoever keeps it needs more than the delta."""

    round: int
    block: int
    delta: Leaving
    layout: Layout
    encoding: Encoding
    done: Future[Encoding]


class Outbox:
    """Lives on the event loop; there `on_chunk(round, chunk)` is called, in order, for each chunk of a delta.

    on_stored: called there with the round of what is on disk, and what gives each chunk of it again. on_fetched: with
    round, index and chunk of what was fetched from there. residuals: by block, where an earlier process left off.
    """

    def __init__(
        self,
        config: Config,
        on_chunk: Callable[[int, Encoded], None],
        on_stored: Callable[[int, tuple[Callable[[], Buffer], ...]], None],
        on_fetched: Callable[[int, int, Encoded], None],
        on_error: Callable[[BaseException], None],
        residuals: Mapping[int, Vector] | None = None,
    ) -> None:
        self._config = config
        self._residuals = dict(residuals or {})  # by block; of the thread
        self._on_chunk, self._on_stored, self._on_fetched = on_chunk, on_stored, on_fetched
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        self._conveyor: Conveyor[Callable[[], None]] = Conveyor(
            "encode", call_soon, on_result=lambda tell: tell(), on_error=on_error
        )

    def put(self, round: int, block: int, delta: Leaving) -> Future[Encoding] | None:
        """Encode a contribution; it is waited for on the thread. Returns what it becomes; None: just the delta."""
        layout = Layout.up(self._config, delta.numel)
        job = _Job(round, block, delta, layout, Encoding(), Future())
        for index in range(layout.count):  # a job each, so that the end of a worker need not wait for a whole block
            self._conveyor.put(partial(self._encode, job, index))
        return job.done if self._remade(layout) else None

    def stored(self, round: int, delta: Spillable, file: Reader) -> None:
        """What was `put` is on disk, and is let go of in memory when all of it was encoded. From any thread."""
        self._conveyor.put(partial(self._store, round, delta, file))

    def fetch(self, round: int, index: int, stored: Stored) -> None:
        """Read a chunk back."""
        self._conveyor.put(partial(self._fetch, round, index, stored))

    def _remade(self, layout: Layout) -> bool:
        """Whether what leaves is not the delta itself."""
        return self._config.privacy.local or not layout.codec.lossless

    def close(self) -> None:
        self._conveyor.close()

    def _store(self, round: int, delta: Spillable, file: Reader) -> Callable[[], None]:
        layout, stored = Layout.up(self._config, delta.numel), StoredVector(file, DELTA)
        delta.spill(stored)
        again = [partial(_read, stored, layout.part(index)) for index in range(layout.count)]
        if self._remade(layout):
            again = [partial(_read, StoredVector(file, chunk_name(n)), slice(None)) for n in range(layout.count)]
        return partial(self._on_stored, round, tuple(again))

    def _fetch(self, round: int, index: int, stored: Stored) -> Callable[[], None]:
        chunk = Encoded.checked(stored.again())
        if chunk.checksum != stored.checksum:
            raise DiskError(f"chunk {index} of the contribution to round {round} is not what was written to the disk")
        return partial(self._on_fetched, round, index, chunk)

    def _encode(self, job: _Job, index: int) -> Callable[[], None]:
        try:
            chunk = self._chunk(job, index)
        except BaseException as error:
            if not job.done.done():
                job.done.set_exception(error)
            raise
        if self._remade(job.layout):
            job.encoding.chunks.append(chunk)
            if index + 1 == job.layout.count and not job.done.done():
                if job.encoding.residual is not None:
                    self._residuals[job.block] = job.encoding.residual
                job.done.set_result(job.encoding)
        return partial(self._on_chunk, job.round, chunk)

    def _chunk(self, job: _Job, index: int) -> Encoded:
        layout, encoding = job.layout, job.encoding
        part, delta = layout.part(index), job.delta.wait()
        residual = None
        if self._config.codec.error_feedback and not layout.codec.lossless:
            before = self._residuals.get(job.block)
            if encoding.residual is None:
                encoding.residual = np.zeros_like(delta) if before is None else np.empty_like(delta)
            residual = encoding.residual[part]
            if before is not None:
                residual[:] = before[part]
        payload, _ = feedback.encode(layout.codec, delta[part], residual)
        return Encoded.checked(payload)


def _read(stored: StoredVector, part: slice) -> Buffer:
    return stored[part].data.cast("B")
