"""The real broker with an eye on its store: `python -m bench.store_broker timed ARGUMENTS`, else as `python -m broker`.

timed      writes down, round by round, what it took to make the round durable: RUN/store.jsonl
nowhere    keeps no round at all: what a round takes more under the other is what the journal costs
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import broker.__main__
import broker.server
from broker.store import BlockStore
from parablock.append_file import AppendFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from parablock.block_versions import BlockVersions
    from parablock.coordinator_events import Store
    from parablock.journal import Journal

    Vector = npt.NDArray[np.float32]

_TIMES = "store.jsonl"


class Timed(BlockStore):
    """What follows the fold of the last chunk: the file's checksum, fsync and rename, and the journal's row."""

    def __init__(self, versions: BlockVersions, journal: Journal, run: str, digest: str, keep: int) -> None:
        super().__init__(versions, journal, run, digest, keep)
        self._times = AppendFile(versions.folder.parent / _TIMES)

    def commit(self, store: Store, tensors: Mapping[str, Vector] | None) -> None:
        began = time.monotonic()
        super().commit(store, tensors)
        self._times.append(json.dumps({"round": store.round, "seconds": time.monotonic() - began}) + "\n")


class Nowhere(BlockStore):
    """Everything is as good as durable at once, and nothing is."""

    def write(self, round: int, attempt: int, block: int, numel: int, parts: Mapping[str, Vector]) -> None:
        del round, attempt, block, numel, parts

    def commit(self, store: Store, tensors: Mapping[str, Vector] | None) -> None:
        del store, tensors


def read_times(run: Path) -> list[float]:
    """Seconds that each round of a timed broker took to become durable."""
    return [json.loads(line)["seconds"] for line in (run / _TIMES).read_text(encoding="utf-8").splitlines()]


def main(argv: list[str]) -> int:
    """The broker's exit code."""
    kind, *arguments = argv
    broker.server.BlockStore = {"timed": Timed, "nowhere": Nowhere}[kind]  # type: ignore[misc]
    return broker.__main__.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
