"""A broker that keeps no round: `python -m bench.unjournaled_broker ARGUMENTS`, else as `python -m broker`.

What a round takes more under the real one is what the journal and the blocks' files cost.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import broker.__main__
import broker.server
from broker.store import BlockStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from parablock.coordinator_events import Store

    Vector = npt.NDArray[np.float32]


class Nowhere(BlockStore):
    """Everything is as good as durable at once, and nothing is."""

    def write(self, round: int, attempt: int, block: int, numel: int, parts: Mapping[str, Vector]) -> None:
        del round, attempt, block, numel, parts

    def commit(self, store: Store, tensors: Mapping[str, Vector] | None) -> None:
        del store, tensors


if __name__ == "__main__":
    broker.server.BlockStore = Nowhere  # type: ignore[misc]
    sys.exit(broker.__main__.main())
