"""The outbox: contributions on their way from the torch thread to the link, encoded chunk by chunk on a thread.

The first chunks travel while the later ones are being encoded, and training goes on meanwhile. What a lossy codec
rounds away is kept here, a residual per block, and added to the block's next contribution. Knows no message.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from parablock import feedback
from parablock.conveyor import Conveyor
from parablock.layout import Layout
from parablock.transfer import Encoded

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from parablock.config import Config

    Vector = npt.NDArray[np.float32]


class Leaving(Protocol):
    """A delta that may still be on its way from the device, as `parablock.staging.Outgoing` is."""

    @property
    def numel(self) -> int: ...

    def wait(self) -> Vector:
        """float32 of shape (numel,), which nobody changes any more; the same memory each time."""


class Outbox:
    """Lives on the event loop; there `on_chunk(round, chunk)` is called, in order, for each chunk of a delta."""

    def __init__(
        self, config: Config, on_chunk: Callable[[int, Encoded], None], on_error: Callable[[BaseException], None]
    ) -> None:
        self._config = config
        self._residuals: dict[int, Vector] = {}  # by block; of the thread
        self._conveyor: Conveyor[tuple[int, Encoded]] = Conveyor(
            "encode",
            asyncio.get_running_loop().call_soon_threadsafe,
            on_result=lambda result: on_chunk(*result),
            on_error=on_error,
        )

    def put(self, round: int, block: int, delta: Leaving) -> None:
        """Encode a contribution; it is waited for on the thread."""
        layout = Layout.up(self._config, delta.numel)
        for index in range(layout.count):  # a job each, so that the end of a worker need not wait for a whole block
            self._conveyor.put(partial(self._encode, round, block, delta, layout, index))

    def close(self) -> None:
        self._conveyor.close()

    def _encode(self, round: int, block: int, leaving: Leaving, layout: Layout, index: int) -> tuple[int, Encoded]:
        part, delta = layout.part(index), leaving.wait()
        residual = None
        if self._config.codec.error_feedback and not layout.codec.lossless:
            if block not in self._residuals:
                self._residuals[block] = np.zeros_like(delta)
            residual = self._residuals[block][part]
        payload, _ = feedback.encode(layout.codec, delta[part], residual)
        return round, Encoded.checked(payload)
