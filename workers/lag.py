"""How late the event loop runs its timers: what the executor's hold on the interpreter costs the network."""

from __future__ import annotations

import asyncio
from collections import deque

_EVERY_S = 0.01
_KEPT = 6000


class LoopLag:
    """Samples while `run` does; `take_p99_ms` gives the 99th percentile since it was last asked, in milliseconds."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_KEPT)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            self._samples.append(max(loop.time() - due, 0.0))

    def take_p99_ms(self) -> float:
        samples = sorted(self._samples)
        self._samples.clear()
        return 1e3 * samples[int(0.99 * (len(samples) - 1))] if samples else 0.0
