"""The torch executor: one thread that owns the device. Everything that touches torch runs here, in order."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

SWITCH_INTERVAL_S = 5e-4
"""How long the torch thread may hold the interpreter while the event loop waits. Steps made of short calls into torch
let go of it sooner by themselves (from 0.1 to 5 ms nothing changed: bench/results/executor.json); this is for those
that are not: with Python's default of 5 ms the loop's p99 lag was 8 ms in the design's prototype."""


class TorchExecutor:
    """`await executor(function, ...)` runs it on the device's thread. threads: torch's intra-op threads.

    switch_interval_s: the interpreter's, which is the whole process's.
    """

    def __init__(self, threads: int, switch_interval_s: float = SWITCH_INTERVAL_S) -> None:
        sys.setswitchinterval(switch_interval_s)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=_start_thread, initargs=(threads,))

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Wait for what is running, and end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start_thread(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
