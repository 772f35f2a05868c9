"""The real broker over a synthetic model, with an eye on itself: CPU seconds, memory, and the time that storing takes.

    python -m bench.light_broker CONFIG.toml --out RUN --blocks 2 --block-bytes 65536 --report FILE

Everything but the model is the broker of a run: its socket, coordinator, folds, record and view. Imports no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import synthetic, usage
from broker.__main__ import loop_factory, tune
from broker.server import Broker
from broker.socket import RouterSocket
from parablock import config as settings
from parablock.block_file import BLOCK, BlockWriter, Label
from parablock.block_versions import BlockVersions
from parablock.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

ENDPOINT = "endpoint"
"""The file in the run's folder that says where the broker listens, as soon as it does."""


class MeteredVersions(BlockVersions):
    """Notes what each block's storing took, and what the process had used by then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored: list[dict[str, Any]] = []
        self.discards = False

    def writer(self, label: Label, numel: int, names: Sequence[str] = (BLOCK,)) -> BlockWriter:
        kind = _DiscardingWriter if self.discards else _MeteredWriter
        return kind(self.path(label.index, label.version), label, numel, names, self.stored)


class WatchedFolder(RunFolder):
    """A run's folder that has the process looked at after each round, once there is a watch."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._watch: usage.Watch | None = None
        self._forget: list[dict[str, Any]] = []

    def begin_watch(self, watch: usage.Watch, forget: list[dict[str, Any]]) -> None:
        """forget: rows to be thrown away each time, as what the benchmark keeps would pass for growth."""
        self._watch, self._forget = watch, forget

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        super().append_metrics(row)
        if self._watch is not None and row["kind"] == "round":
            self._watch.look(row["round"])
            self._forget.clear()


class _MeteredWriter(BlockWriter):
    """Notes what it took to make a block durable that was written while it was folded."""

    def __init__(
        self, path: Path, label: Label, numel: int, names: Sequence[str], stored: list[dict[str, Any]]
    ) -> None:
        super().__init__(path, label, numel, names)
        self._round = label.round
        self._stored = stored

    def commit(self, entry: str = "") -> None:
        began = time.monotonic()
        super().commit(entry)
        ended = time.monotonic()
        self._stored.append({"round": self._round, "began": began, "ended": ended, "cpu_s": usage.cpu_s()})


class _DiscardingWriter(_MeteredWriter):
    """Keeps nothing, so that an exchange is N uploads, the fold, and N downloads, and no disk."""

    def write(self, parts: Mapping[str, Vector]) -> None:
        del parts

    def commit(self, entry: str = "") -> None:
        del entry
        self.abort()
        now = time.monotonic()
        self._stored.append({"round": self._round, "began": now, "ended": now, "cpu_s": usage.cpu_s()})


async def _serve(config: settings.Config, base: Any, folder: RunFolder, socket: RouterSocket) -> bool:
    broker = Broker(config, base, folder, socket, "bench", time.time_ns())
    return (await broker.run()).complete


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 where the run did not come to its end."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.light_broker", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", type=Path, help="TOML file of the run's settings")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--blocks", type=int, required=True, help="blocks of the synthetic model")
    parser.add_argument("--block-bytes", type=int, required=True, help="bytes of each of them, in float32")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="where to write the measures, JSON")
    parser.add_argument("--discard", action="store_true", help="do not store the blocks")
    parser.add_argument("--watch", type=Path, metavar="FILE", help="write there what this process holds by round")
    options = parser.parse_args(argv)
    tune()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    config = settings.load(options.config)
    manifest = synthetic.manifest(options.blocks, options.block_bytes)
    socket = RouterSocket(config.network.bind)
    memory = usage.Memory()
    base = synthetic.base(manifest)
    with WatchedFolder.create(options.out, config) as folder:
        assert isinstance(folder, WatchedFolder)
        folder.blocks = versions = MeteredVersions(folder.blocks.folder)
        versions.discards = options.discard
        if options.watch:
            folder.begin_watch(usage.Watch(options.watch), versions.stored)
        folder.write_manifest(manifest, synthetic.WEIGHTS)
        (options.out / ENDPOINT).write_text(socket.endpoint + "\n", encoding="utf-8")
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            complete = runner.run(_serve(config, base, folder, socket))
        report = {"stored": versions.stored, "peak_bytes": memory.peak()}
    options.report.write_text(json.dumps(report), encoding="utf-8")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
