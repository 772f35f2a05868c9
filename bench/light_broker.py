"""The real broker over a synthetic model, with an eye on itself: CPU seconds, memory, and the time that storing takes.

    python -m bench.light_broker CONFIG.toml --out RUN --blocks 2 --block-bytes 65536 --report FILE
    python -m bench.light_broker --resume RUN --report FILE

Everything but the model is the broker of a run: its socket, coordinator, folds, record and view. Imports no torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import synthetic, usage
from broker.__main__ import loop_factory, tune
from broker.authenticator import Authenticator
from broker.opening import begin, resume
from broker.server import Broker
from broker.socket import RouterSocket
from parablock import config as settings
from parablock.block_file import BLOCK, BlockWriter, Label
from parablock.block_versions import BlockVersions
from parablock.journal import Journal
from parablock.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from broker.opening import Opened
    from parablock.journal_rows import Row

    Vector = npt.NDArray[np.float32]


class MeteredVersions(BlockVersions):
    """Notes what each block's storing took, and what the process had used by then."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored: list[dict[str, Any]] = []
        self.discards = False

    def writer(self, label: Label, numel: int, names: Sequence[str] = (BLOCK,)) -> BlockWriter:
        kind = _DiscardingWriter if self.discards else _MeteredWriter
        return kind(self.path(label.index, label.version), label, numel, names, self.stored)


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


class _ForgetfulJournal(Journal):
    """Keeps no rows either."""

    def append(self, row: Row) -> None:
        self._take(row, "")


def _watch(folder: RunFolder, watch: usage.Watch, forget: list[dict[str, Any]]) -> None:
    """Have `watch` look after each round. forget: thrown away then; what the benchmark keeps would pass for growth."""
    append = folder.append_metrics

    def append_and_look(row: Mapping[str, Any]) -> None:
        append(row)
        if row["kind"] == "round":
            watch.look(row["round"])
            forget.clear()

    folder.append_metrics = append_and_look  # type: ignore[method-assign]


def _open(options: argparse.Namespace) -> tuple[Opened, RouterSocket]:
    """A new run, or the one of --resume, at the address where it was before."""
    door = Authenticator(options.keys) if options.keys is not None else None
    if options.resume is not None:
        opened = resume(options.resume, None, ())
        return opened, RouterSocket(RunFolder(options.resume).endpoint() or opened.config.network.bind, door)
    config = settings.load(options.config)
    socket = RouterSocket(config.network.bind, door)
    return begin(config, options.out, synthetic.base(synthetic.manifest(options.blocks, options.block_bytes))), socket


async def _serve(opened: Opened, socket: RouterSocket) -> bool:
    return (await Broker(opened, socket).run()).complete


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 where the run did not come to its end."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.light_broker", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", nargs="?", type=Path, help="TOML file of the run's settings")
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--out", type=Path, help="the run's folder")
    folder.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--keys", type=Path, metavar="DIR", help="the keys folder; without one: unencrypted")
    parser.add_argument("--blocks", type=int, help="blocks of the synthetic model")
    parser.add_argument("--block-bytes", type=int, help="bytes of each of them, in float32")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE", help="where to write the measures, JSON")
    parser.add_argument("--discard", action="store_true", help="do not store the blocks")
    parser.add_argument("--watch", type=Path, metavar="FILE", help="write there what this process holds by round")
    options = parser.parse_args(argv)
    if options.out is not None and None in (options.config, options.blocks, options.block_bytes):
        parser.error("a new run needs a CONFIG.toml, --blocks and --block-bytes")
    tune()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    memory = usage.Memory()
    opened, socket = _open(options)
    opened.folder.blocks = versions = MeteredVersions(opened.folder.blocks.folder)
    if options.discard:
        versions.discards = True
        opened.journal.close()
        opened = dataclasses.replace(opened, journal=_ForgetfulJournal.open(opened.journal.path))
    if options.watch is not None:
        _watch(opened.folder, usage.Watch(options.watch), versions.stored)
    with contextlib.closing(opened):
        opened.write_endpoint(socket.endpoint, socket.door.public if socket.door is not None else None)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            complete = runner.run(_serve(opened, socket))
        report = {"stored": versions.stored, "peak_bytes": memory.peak()}
    options.report.write_text(json.dumps(report), encoding="utf-8")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
