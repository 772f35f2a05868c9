"""`python -m broker CONFIG.toml`: serve one run until every worker has finished it. `--resume RUN`: go on with one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from broker import descriptors, opening
from broker.authenticator import Authenticator
from broker.blocks import BaseModel
from broker.server import Broker
from broker.socket import BindError, RouterSocket
from parablock import config as settings
from parablock.accountant import NoAccountantError
from parablock.allocator import keep_freed_memory
from parablock.budget import plan
from parablock.invite import Invite
from parablock.journal_rows import JournalError
from parablock.keys import KeyFileError, fingerprint, folder_of_user
from parablock.network import EndpointError, check_endpoint
from parablock.run_folder import CONFIG, INVITE, RunFolder, RunFolderError, how_to_go_on
from parablock.schedule import gap_holds
from parablock.throw_away import remove, throw_away_keys
from parablock.units import counted

try:
    import uvloop
except ImportError:  # as on Windows, for which there is none
    uvloop = None

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from broker.opening import Opened
    from parablock.config import Config

EXIT_INPUT, EXIT_LATER = 2, 75

_SWITCH_INTERVAL_S = 5e-4
"""How long the fold thread may hold the interpreter while the event loop waits; Python's default is 5 ms."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parablock broker", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without one, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key; may be repeated")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, help="the run's folder (default: runs/ and the present time)")
    may_change = ", ".join(sorted(settings.MAY_CHANGE))
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help=f"go on with the run in this folder, with its settings; --set may change {may_change}",
    )
    any_port = (
        "with --resume: where the port of the broker before is taken, listen on any other; its workers are not told"
    )
    parser.add_argument("--any-port", action="store_true", help=any_port)
    where = "the keys folder (default: what `parablock run` made in RUN, or $XDG_CONFIG_HOME or ~/.config, /parablock)"
    parser.add_argument("--keys", type=Path, metavar="DIR", help=where)
    parser.add_argument("--allow-plain-tcp", action="store_true", help="listen unencrypted, on this machine only")
    parser.add_argument("--verbose", action="store_true", help="log every oddity")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    tune()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    out: Path = arguments.resume or arguments.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    door = _door_options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes them over
        signal.signal(number, partial(_give_up, out, door))
    try:
        if arguments.resume is not None:
            opened, socket = _resume(arguments)
        else:
            opened, socket = _begin(arguments, out)
    except _WRONG_INPUT as error:
        print(f"parablock broker: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        return _refused(out, door, error)
    with (
        contextlib.closing(opened),
        contextlib.closing(socket),
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        code = runner.run(_run(opened, socket, door))
    if code == 0 and arguments.resume is not None and arguments.keys is None:  # else `parablock run` waits for workers
        _throw_away(arguments.resume)
    return code


class _WrongModelError(ValueError):
    """The model cannot be loaded, or not be cut as the settings say."""


_WRONG_INPUT = (
    settings.ConfigError, EndpointError, KeyFileError, RunFolderError, JournalError, BindError, NoAccountantError,
    _WrongModelError,
)  # fmt: skip


def _begin(arguments: argparse.Namespace, out: Path) -> tuple[Opened, RouterSocket]:
    config = _within_budget(settings.load(arguments.config, arguments.set))
    settings.check_installed(config)
    check_endpoint(config.network.bind, plain=arguments.allow_plain_tcp, any_port=True)
    RunFolder.check_free(out)
    socket = RouterSocket(config.network.bind, _door(arguments))
    # Imported here: torch and transformers take seconds, and a wrong setting should be told at once.
    from parablock.blocks import PartitionError
    from parablock.models import ModelError

    try:
        opened = opening.begin(config, out, load_base(config))
    except (ModelError, PartitionError) as error:
        socket.close()
        raise _WrongModelError(str(error)) from error
    except BaseException:
        socket.close()
        raise
    return _announced(opened, socket), socket


def _resume(arguments: argparse.Namespace) -> tuple[Opened, RouterSocket]:
    folder = RunFolder.open(arguments.resume)
    folder.check_unlocked()  # before its port is found taken
    config = settings.load(arguments.config or folder.path / CONFIG, arguments.set)
    settings.check_installed(config)
    socket = _bound_again(arguments, _within_budget(config))
    try:  # nothing is put right or written before it is sure that the run can be served
        opened = opening.resume(arguments.resume, arguments.config, arguments.set)
    except BaseException:
        socket.close()
        raise
    if socket.door is not None:
        _tell_new_key(opened.folder.path, socket.door.public)
    return _announced(opened, socket), socket


def _within_budget(config: Config) -> Config:
    """The settings as `privacy.budget` allows them, which is said."""
    planned = plan(config)
    if planned.told:
        print(f"parablock broker: {planned.told}", file=sys.stderr)
    return planned.config


def _bound_again(arguments: argparse.Namespace, config: Config) -> RouterSocket:
    """Where the broker before listened, since its clients wait there; elsewhere only where that is asked for."""
    bind = config.network.bind
    if not any(override.partition("=")[0].strip() == "network.bind" for override in arguments.set):
        bind = RunFolder(arguments.resume).endpoint() or bind
    check_endpoint(bind, plain=arguments.allow_plain_tcp, any_port=True)
    try:
        return RouterSocket(bind, _door(arguments))
    except BindError:
        if not arguments.any_port:
            raise
    socket = RouterSocket(bind.rpartition(":")[0] + ":*", _door(arguments))
    print(f"parablock broker: {bind} is taken; listening on {socket.endpoint} instead", file=sys.stderr)
    return socket


def _door(arguments: argparse.Namespace) -> Authenticator | None:
    """Who lets clients in; None where nothing is encrypted. Raises KeyFileError."""
    if arguments.allow_plain_tcp:
        if arguments.keys is not None:
            raise KeyFileError("--allow-plain-tcp is without keys: leave it or --keys out")
        return None
    own = throw_away_keys(arguments.resume) if arguments.resume is not None else None
    return Authenticator(arguments.keys or own or folder_of_user())


def _throw_away(run: Path) -> None:
    """The keys that `parablock run` had made for a run that is complete."""
    if (folder := throw_away_keys(run)) is not None:
        try:
            remove(folder)
        except OSError as error:
            print(f"parablock broker: delete {folder}, which the disk refuses: {error}", file=sys.stderr)


def _door_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    """By which this broker has clients let in, as the next one of the run needs them as well."""
    if arguments.allow_plain_tcp:
        return ("--allow-plain-tcp",)
    return ("--keys", str(arguments.keys)) if arguments.keys is not None else ()


def _tell_new_key(path: Path, public: str) -> None:
    """That the run's clients know the broker by another key than it has now."""
    try:
        before = Invite.read(path / INVITE).broker
    except KeyFileError as error:
        if (path / INVITE).exists():
            print(f"parablock broker: {error}; it is written anew", file=sys.stderr)
        return
    if before != public:
        print(
            f"parablock broker: THE BROKER HAS ANOTHER KEY than before: {fingerprint(public)}, and it was "
            f"{fingerprint(before)}. Clients with an invite to that one do not come in: each needs a new invite "
            f"(parablock invite {path} --endpoint tcp://HOST:PORT). If that is not meant, go on with the right --keys",
            file=sys.stderr,
        )


def _announced(opened: Opened, socket: RouterSocket) -> Opened:
    """Say where the broker listens; closes both where the disk refuses."""
    try:
        opened.write_endpoint(socket.endpoint, socket.door.public if socket.door is not None else None)
    except BaseException:
        opened.close()
        socket.close()
        raise
    return opened


def _refused(out: Path, door: Sequence[str], error: OSError) -> int:
    named = f" ({error.filename})" if error.filename else ""
    print(f"parablock broker: the disk refuses the run folder {out}: {error.strerror or error}{named}", file=sys.stderr)
    print(f"when it no longer does, {how_to_go_on(out, door)}", file=sys.stderr)
    return EXIT_LATER


def tune() -> None:
    """Make this process ready to move blocks, see `parablock.allocator`, and to have many connections."""
    descriptors.allow_all()
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


async def _run(opened: Opened, socket: RouterSocket, door: Sequence[str] = ()) -> int:
    config, path, manifest = opened.config, opened.folder.path, opened.base.manifest
    try:
        broker = Broker(opened, socket)
    except OSError as error:
        return _refused(path, door, error)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _interrupt, broker, number)
    blocks = counted(len(manifest.blocks), "block")
    broker.say(
        f"run {path} · {config.mode} · {counted(manifest.numel, 'parameter')} in {blocks} · "
        f"listening on {socket.endpoint} for {counted(config.round.clients, 'worker')}"
    )
    if socket.door is None:
        broker.say("nothing is encrypted, and anybody on this machine may take part (--allow-plain-tcp)")
    else:
        nobody = f"nobody yet (parablock keys allow FILE.public --keys {socket.door.folder})"
        allowed = ", ".join(socket.door.clients) or nobody
        broker.say(f"encrypted; the broker's key is {fingerprint(socket.door.public)}; let in: {allowed}")
    if not gap_holds(len(manifest.blocks), config.in_flight):
        broker.say(
            f"{blocks}, which is too few for {counted(config.in_flight, 'round')} in flight: a block is trained "
            "again before it has landed, and lands by the delta rule, which is not exact"
        )
    if broker.epsilon:
        broker.say(f"epsilon so far: {broker.epsilon:.4g} of {config.privacy.budget:g}")
    over = await broker.run()
    if broker.epsilon is not None:
        print(f"epsilon spent: {broker.epsilon:.4g} of {config.privacy.budget:g}", file=sys.stderr)
    print(f"{'done' if over.complete else 'not complete'}: {over.reason}; {path}", file=sys.stderr)
    if not over.complete:
        print(how_to_go_on(path, door), file=sys.stderr)
    return 0 if over.complete else EXIT_LATER


def _give_up(out: Path, door: Sequence[str], number: int, _frame: FrameType | None) -> None:
    name, more = signal.Signals(number).name, how_to_go_on(out, door)
    print(f"parablock broker: interrupted ({name}) before it served anybody; {more}", file=sys.stderr)
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
    if uvloop is None:
        print("parablock: uvloop is not installed here; using asyncio's own event loop", file=sys.stderr)
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


if __name__ == "__main__":
    sys.exit(main())
