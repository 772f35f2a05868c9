"""The inbox: blocks on their way from the link to the torch thread, decoded chunk by chunk on a thread as they come.

A block is put together in a buffer of its own, so that a chunk's frame is free again at once, and when the last chunk
has come next to nothing is left to do but to bring it to the device, which `parablock.staging` does. Knows no message
and no model.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from parablock.conveyor import Conveyor
from parablock.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.participant_events import Arrived
    from parablock.staging import Incoming
    from parablock.wire import Buffer

    Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Delivery:
    """A block that has arrived. values: on their way to the device, for the torch thread to wait for; None: no change.

    change: whether they are to be added to the version before (`arrived.base`), or are the block itself.
    """

    arrived: Arrived
    values: Future[Incoming] | None
    change: bool


class Staging(Protocol):
    """Memory that values are brought to the device from; `parablock.staging.Staging`."""

    def buffer(self, numel: int) -> Vector: ...

    def bring(self, values: Vector) -> Incoming: ...


class Inbox:
    """Called on the event loop only; the buffers are the thread's until they are delivered."""

    def __init__(
        self, config: Config, manifest: Manifest, staging: Staging, on_error: Callable[[BaseException], None]
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._staging = staging
        self._buffers: dict[tuple[int, int], Vector] = {}  # by round and attempt; of the thread
        self._conveyor: Conveyor[None] = Conveyor(
            "decode", asyncio.get_running_loop().call_soon_threadsafe, on_result=lambda _: None, on_error=on_error
        )

    def take(self, round: int, block: int, attempt: int, index: int, payload: Buffer) -> None:
        """Decode a chunk into its place."""
        layout = self._layout(block, attempt)
        self._conveyor.put(partial(self._decode, (round, attempt), layout, index, payload))

    def drop(self, round: int, attempt: int) -> None:
        """The rest of it will not come."""
        self._conveyor.put(partial(self._forget, (round, attempt)))

    def deliver(self, arrived: Arrived) -> Delivery:
        """Every chunk was taken."""
        if not arrived.contributors:
            return Delivery(arrived, None, change=False)
        values: Future[Incoming] = Future()
        self._conveyor.put(partial(self._bring, (arrived.round, arrived.attempt), values))
        return Delivery(arrived, values, change=not self._layout(arrived.block, arrived.attempt).codec.lossless)

    def close(self) -> None:
        self._conveyor.close()

    def _layout(self, block: int, attempt: int) -> Layout:
        return Layout.down(self._config, self._manifest.blocks[block].numel, attempt)

    # On the thread

    def _decode(self, key: tuple[int, int], layout: Layout, index: int, payload: Buffer) -> None:
        if key not in self._buffers:
            self._buffers[key] = self._staging.buffer(layout.numel)  # which may pin memory, and that takes a while
        part = layout.part(index)
        self._buffers[key][part] = layout.codec.decode(payload, part.stop - part.start)

    def _forget(self, key: tuple[int, int]) -> None:
        del self._buffers[key]

    def _bring(self, key: tuple[int, int], values: Future[Incoming]) -> None:
        """Whoever lands the block waits for `values`, so that it hears of a failure too."""
        try:
            values.set_result(self._staging.bring(self._buffers.pop(key)))
        except BaseException as error:
            values.set_exception(error)
            raise
