"""A worker on a slower machine: `python -m bench.braked FACTOR ...`, where the rest is what `python -m workers` takes.

After each optimizer step the torch thread sleeps until the step has taken FACTOR times as long as it did. Nothing else
is slowed: the event loop, the encoder and the link go on as they would beside a slower device.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from workers import __main__ as worker
from workers import trainer

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Sequence

    from workers.inbox import Delivery
    from workers.keeper import Keeper
    from workers.setup import Setup


class BrakedTrainer(trainer.Trainer):
    """factor: at least 1."""

    def __init__(
        self,
        factor: float,
        setup: Setup,
        clients: int,
        arrivals: deque[Delivery],
        on_step: Callable[[int, int], None],
        keeper: Keeper | None = None,
    ) -> None:
        self._factor = factor
        self._computed_s = time.thread_time()
        self._told = on_step
        super().__init__(setup, clients, arrivals, self._after_step, keeper)

    def _after_step(self, round: int, step: int) -> None:
        now = time.thread_time()  # of this thread, which computes alone: one torch thread
        time.sleep((self._factor - 1.0) * (now - self._computed_s))
        self._computed_s = time.thread_time()
        self._told(round, step)


def main(argv: Sequence[str]) -> int:
    """The worker's exit code."""
    factor, *rest = argv
    trainer.Trainer = partial(BrakedTrainer, float(factor))  # type: ignore[assignment,misc]
    return worker.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
