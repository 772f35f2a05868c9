"""`python -m broker CONFIG.toml`: serve one run until every worker has finished it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from broker.blocks import BaseModel
from broker.server import Broker
from broker.socket import BindError, RouterSocket
from parablock import config as settings
from parablock.allocator import keep_freed_memory
from parablock.network import EndpointError, check_endpoint
from parablock.run_folder import RunFolder, RunFolderError
from parablock.schedule import gap_holds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from parablock.config import Config

EXIT_INPUT, EXIT_LATER = 2, 75

_SWITCH_INTERVAL_S = 5e-4
"""How long the fold thread may hold the interpreter while the event loop waits; Python's default is 5 ms."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parablock broker", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without one, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key; may be repeated")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/ and the present time)")
    parser.add_argument(
        "--allow-plain-tcp",
        action="store_true",
        help="listen unencrypted beyond this machine; for private test networks only",
    )
    parser.add_argument("--verbose", action="store_true", help="log every oddity")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    tune()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes them over
        signal.signal(number, _give_up)
    out = arguments.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        config = settings.load(arguments.config, arguments.set)
        check_endpoint(config.network.bind, allow_plain_tcp=arguments.allow_plain_tcp, any_port=True)
        RunFolder.check_free(out)
        socket = RouterSocket(config.network.bind)
    except (settings.ConfigError, EndpointError, RunFolderError, BindError) as error:
        print(f"parablock broker: {error}", file=sys.stderr)
        return EXIT_INPUT
    try:
        return _serve(config, out, socket)
    finally:
        socket.close()


def tune() -> None:
    """Make this process ready to move blocks; see `parablock.allocator`."""
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def _serve(config: Config, out: Path, socket: RouterSocket) -> int:
    # Imported here: torch and transformers take seconds, and a wrong setting should be told at once.
    from parablock.blocks import PartitionError
    from parablock.models import ModelError

    try:
        base = load_base(config)
        folder = RunFolder.create(out, config)
        folder.write_manifest(base.manifest, base.weights)
        (out / "endpoint").write_text(socket.endpoint + "\n", encoding="utf-8")
    except (ModelError, PartitionError, RunFolderError) as error:
        print(f"parablock broker: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"parablock broker: cannot write the run folder {out}: {error.strerror or error}", file=sys.stderr)
        return EXIT_LATER
    with folder, asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(config, base, folder, socket))


async def _run(config: Config, base: BaseModel, folder: RunFolder, socket: RouterSocket) -> int:
    run = f"{folder.path.resolve().name[:40]}-{secrets.token_hex(8)}"
    run = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in run)
    broker = Broker(config, base, folder, socket, run, time.time_ns())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _interrupt, broker, number)
    manifest = base.manifest
    broker.say(
        f"run {folder.path} · {config.mode} · {manifest.numel:,} parameters in {len(manifest.blocks)} blocks · "
        f"listening on {socket.endpoint} for {config.round.clients} workers"
    )
    if not gap_holds(len(manifest.blocks), config.in_flight):
        broker.say(
            f"{len(manifest.blocks)} blocks are too few for {config.in_flight} rounds in flight: a block is trained "
            "again before it has landed, and lands by the delta rule, which is not exact"
        )
    over = await broker.run()
    print(f"{'done' if over.complete else 'not complete'}: {over.reason}; {folder.path}", file=sys.stderr)
    return 0 if over.complete else EXIT_LATER


def _give_up(number: int, _frame: FrameType | None) -> None:
    print(f"parablock broker: interrupted ({signal.Signals(number).name}) before the run began", file=sys.stderr)
    sys.exit(EXIT_LATER)


def _interrupt(broker: Broker, number: int) -> None:
    """The first signal ends the run in good order; a second one, of either kind, ends the process."""
    loop = asyncio.get_running_loop()
    for other in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(other)
        signal.signal(other, signal.SIG_DFL)
    broker.stop(f"the broker was interrupted ({signal.Signals(number).name})")


def load_base(config: Config) -> BaseModel:
    """The base model's layout, digests and float32 values; the model itself is let go."""
    from parablock import models, trainable
    from parablock.blocks import read_block

    models.quiet()
    loaded = models.load(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed)
    manifest = trainable.prepare(loaded.model, config)
    values = []
    for block in manifest.blocks:
        vector = read_block(loaded.model, block).numpy().astype(np.float32, copy=False)
        vector.flags.writeable = False
        values.append(vector)
    return BaseModel(manifest, models.weights_digest(loaded.model), models.tokenizer_digest(loaded.tokenizer), values)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop, or asyncio's where there is no uvloop, which is said."""
    try:
        import uvloop
    except ImportError:
        print("parablock: uvloop is not installed here; using asyncio's own event loop", file=sys.stderr)
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    sys.exit(main())
