"""`python -m workers --invite FILE --data FILE`: take part in a run with this machine's rows."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parablock.accountant import NoAccountantError
from parablock.allocator import keep_freed_memory
from parablock.config import ConfigError
from parablock.keys import KeyFileError
from parablock.messages import MAX_NAME, MAX_SUMMED, NAME
from parablock.network import EndpointError
from parablock.participant_events import End, Finish, Gone, Prepared
from parablock.printable import printable
from workers.contact import add_arguments, contact
from workers.executor import TorchExecutor
from workers.link import Interrupted, Link, SessionEnded
from workers.state_folder import DiskError, Identity, StateError, StateFolder

try:
    import uvloop
except ImportError:  # as on Windows, for which there is none
    uvloop = None

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from workers.contact import Contact
    from workers.keeper import Keeper
    from workers.releases import Releases
    from workers.setup import Local, Setup
    from workers.state_folder import State
    from workers.trainer import Trainer

log = logging.getLogger("worker")

EXIT_DONE, EXIT_INPUT, EXIT_REFUSED, EXIT_LATER = 0, 2, 3, 75
_EXITS = {End.DONE: EXIT_DONE, End.REFUSED: EXIT_REFUSED, End.LOST: EXIT_LATER}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parablock worker", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--data", default="builtin", help="this worker's training rows; they never leave it")
    parser.add_argument("--eval", default="", help="held-out rows")
    parser.add_argument(
        "--tell-tasks",
        action="store_true",
        help="tell the broker the labels in the held-out rows' field that eval.task names, for scores by task",
    )
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="part I of N (from 0) of the rows")
    name = "without keys, this worker's name in the run (default: host and process); else the broker's list says it"
    parser.add_argument("--name", help=name)
    parser.add_argument("--model", default="", help="where the run's model lies on this machine, if elsewhere")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    parser.add_argument(
        "--threads", type=_count, default=0, help="torch threads on the CPU (default: one for each core)"
    )
    parser.add_argument(
        "--patience", type=_seconds, default=1800.0, metavar="S", help="wait this long for a silent broker"
    )
    parser.add_argument(
        "--state",
        metavar="DIR|none",
        help="where the worker keeps what a new process needs to go on where this one was killed (default: "
        "$XDG_STATE_HOME or ~/.local/state, /parablock/RUN/NAME); none: nowhere",
    )
    parser.add_argument(
        "--max-epsilon",
        type=_epsilon,
        default=math.inf,
        metavar="E",
        help="take part only where this worker adds its own noise (privacy.where = local) and the run costs it no more",
    )
    parser.add_argument(
        "--min-summed",
        type=_summed,
        default=0,
        metavar="N",
        help="take part only where contributions are masked (secure.enabled) and each sum that the broker sees is of N "
        "clients' or more",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--verbose", action="store_true", help="log every oddity")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    keep_freed_memory()
    level = logging.DEBUG if arguments.verbose else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(level)
    for number in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes them over
        signal.signal(number, _give_up)
    folder = None
    try:
        there = contact(arguments)
        if arguments.state not in (None, "none"):
            folder = StateFolder(Path(arguments.state))  # locked before anybody hears of this process
        earlier = None if folder is None else folder.identity
        own = there.credentials.secret.name if there.credentials is not None else _default_name()
        name = arguments.name or (earlier.name if earlier is not None else own)
        if not re.fullmatch(NAME, name) or len(name) > MAX_NAME:
            raise EndpointError(
                f"--name has 1 to {MAX_NAME} letters, digits, dots, dashes or underscores, and begins with a letter or "
                f"a digit; got {name!r}"
            )
    except (EndpointError, KeyFileError, StateError) as error:
        return _complain(error)
    except DiskError as error:
        return _come_back(error)

    from workers.setup import Local  # torch takes seconds to import; a wrong address should be told at once

    local = Local(
        name=name,
        train=arguments.data,
        held_out=arguments.eval,
        shard=arguments.shard,
        model=arguments.model,
        device=arguments.device,
        threads=arguments.threads or os.cpu_count() or 1,
        trust_remote_code=arguments.trust_remote_code,
        tell_tasks=arguments.tell_tasks,
        max_epsilon=arguments.max_epsilon,
        min_summed=arguments.min_summed,
    )
    named = arguments.name or folder is not None or there.credentials is not None
    again = "" if named else f" --name {name}"
    keeping = None if arguments.state == "none" else Keeping(folder, again)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_take_part(local, there, arguments.patience, keeping))


class _Lines(logging.Formatter):
    """A line for each message, whatever words of the broker are in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def _give_up(number: int, _frame: FrameType | None) -> None:
    print(f"parablock worker: interrupted ({signal.Signals(number).name}) before it joined", file=sys.stderr)
    sys.exit(EXIT_LATER)


def _default_name() -> str:
    return _as_name(f"{socket.gethostname()[:40]}-{os.getpid()}", "worker")


def _as_name(text: str, instead: str) -> str:
    """The text with a dash for each character that a name does not have. instead: of what no name begins with."""
    return re.sub(r"^[^A-Za-z0-9]+", f"{instead}-", re.sub(r"[^A-Za-z0-9._-]", "-", text))


@dataclass(frozen=True)
class Keeping:
    """That the worker's state is kept. folder: where; None: in the user's own place, by run and name.

    again: what the command that comes back needs beside what this one was given.
    """

    folder: StateFolder | None = None
    again: str = ""

    def open(self, run: str, name: str) -> StateFolder:
        """Raises StateError and DiskError."""
        if self.folder is not None:
            return self.folder
        home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        place = Path(home) / "parablock"
        return StateFolder(place / _as_name(run, "run") / name, within=place)


async def _take_part(local: Local, there: Contact, patience_s: float, keeping: Keeping | None) -> int:
    return await Worker(local, there, patience_s, keeping).run()


class Worker:
    """One worker process: its link, its torch executor, its state on disk, and what ends them.

    keeping: None: nothing is kept.
    """

    def __init__(self, local: Local, there: Contact, patience_s: float, keeping: Keeping | None = None) -> None:
        self._local = local
        self._keeping = keeping
        self._folder: StateFolder | None = None
        self._keeper: Keeper | None = None
        self._releases: Releases | None = None  # where this worker adds its own noise
        self._link = Link(
            there.endpoint,
            local.name,
            secrets.token_hex(16),
            patience_s,
            on_gone=self._stop_training,
            credentials=there.credentials,
            run=there.run,
        )
        self._torch = TorchExecutor(local.threads)
        self._loop = asyncio.get_running_loop()
        self._trainer: Trainer | None = None
        self._interrupted = ""

    async def run(self) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, number)
        loop.set_exception_handler(lambda _loop, context: self._link.fail(context))
        try:
            return await self._take_part()
        finally:
            self.close()

    def close(self) -> None:
        """End all threads; what was told to the keeper is on disk then."""
        self._torch.close()
        if self._keeper is not None:
            self._keeper.close()  # before the link, whose outbox may still encode what is to be kept
        elif self._folder is not None:
            self._folder.close()
        self._link.close()

    async def _take_part(self) -> int:
        from parablock import models
        from parablock.blocks import PartitionError
        from workers.lag import LoopLag
        from workers.rounds import RoundLoop
        from workers.rows import DataError
        from workers.setup import DeviceError, prepare
        from workers.trainer import Stopped

        lag = LoopLag()
        sampling = asyncio.get_running_loop().create_task(lag.run())
        models.quiet()
        try:
            await self._link.until(lambda: self._link.terms is not None)
            assert self._link.terms is not None
            setup = await self._torch(prepare, self._link.terms, replace(self._local, name=self._link.name))
            self._trainer, left = await self._join(setup)
            keeper, releases = self._keeper, self._releases
            await RoundLoop(setup, self._link, self._torch, self._trainer, lag, keeper, left, releases).run()
            if releases is not None:
                log.info("what this worker has told of its data has cost an epsilon of %.4g", releases.epsilon)
            gone = await self._link.leave("done")
            if self._keeper is not None and gone.end is End.DONE:
                self._keeper.remove()
            return self._farewell(gone)
        except (
            ConfigError,
            models.ModelError,
            DataError,
            PartitionError,
            DeviceError,
            StateError,
            NoAccountantError,
        ) as error:
            await self._link.leave("the worker's own input is wrong")
            return _complain(error)
        except DiskError as error:
            await self._link.leave("the worker's own state cannot be read or written")
            return _come_back(error)
        except (Interrupted, Stopped):
            if self._link.gone is not None:
                return self._farewell(self._link.gone)
            self._farewell(await self._link.leave(f"interrupted ({self._interrupted})"))
            self._tell_how_to_come_back()
            return EXIT_LATER
        except SessionEnded as ended:
            return self._farewell(ended.gone)
        except Exception:
            self._link.handle(Finish("the worker failed"))  # so that nobody waits for it; then fail as loudly as it can
            raise
        finally:
            sampling.cancel()

    async def _join(self, setup: Setup) -> tuple[Trainer, State | None]:
        """Take part from where an earlier process has left off, if there is one. Of what that has left only facts are
        returned: whatever has a block's size is others' now, who let it go in time."""
        from workers.comeback import kept
        from workers.trainer import Trainer

        link = self._link
        state = await self._torch(self._resume, setup)
        left = None if state is None else kept(state, setup.config, setup.manifest, link.participant.run)
        prepared = Prepared(setup.config, setup.manifest, setup.base, setup.tokenizer_digest, len(setup.rows), left)
        link.prepared(prepared, setup.staging, None if state is None else state.residuals)
        await link.until(lambda: link.started is not None)
        clients = link.clients if state is None or state.position is None else state.position.clients
        trainer = await self._torch(Trainer, setup, clients, link.arrivals, link.step, self._keeper)
        if state is None:
            return trainer, None
        assert self._folder is not None
        await self._torch(trainer.resume, state, self._folder)
        return trainer, replace(state, contributions={}, residuals={})

    def _resume(self, setup: Setup) -> State | None:
        """Begin to keep what this process does; what an earlier one of this worker has left. Raises StateError and
        DiskError."""
        from parablock.budget import plan
        from workers.keeper import Keeper
        from workers.releases import Releases

        private = setup.config.privacy.local
        if self._keeping is None:
            if private:
                raise StateError(
                    "with privacy.where = local a worker keeps on disk what it has told of its data, so that a new "
                    "process tells none of it twice; take part without --state none"
                )
            return None
        run = self._link.participant.run
        self._folder = self._keeping.open(run, setup.name)
        state = self._folder.begin(Identity(setup.name, run, setup.manifest.digest))
        if state is not None and state.position is not None:
            log.info("going on from %s, with round %d", self._folder.path, state.position.round)
        if private:
            self._releases = Releases(self._folder, run, state, setup.config)
            log.info("%s", plan(setup.config).told)
        call_soon, fail = self._loop.call_soon_threadsafe, self._link.fail
        self._keeper = Keeper(self._folder, state, call_soon, lambda error: fail({"exception": error}))
        return state

    def _farewell(self, gone: Gone) -> int:
        if gone.end is End.LOST and self._keeper is not None:
            self._tell_how_to_come_back()
        if gone.end is End.DONE:
            log.info("%s", gone.reason)
        else:
            log.error("%s", gone.reason)
        return _EXITS[gone.end]

    def _tell_how_to_come_back(self) -> None:
        if self._keeping is not None and self._folder is not None:
            more = f" with{self._keeping.again}" if self._keeping.again else ""
            log.info("the same command%s goes on from %s", more, self._folder.path)

    def _interrupt(self, number: int) -> None:
        """The first signal leaves the run in good order; a second one, of either kind, ends the process."""
        loop = asyncio.get_running_loop()
        for other in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(other)
            signal.signal(other, signal.SIG_DFL)
        self._interrupted = signal.Signals(number).name
        log.info("interrupted; leaving the run (once more to end at once)")
        self._stop_training()
        self._link.interrupt()

    def _stop_training(self) -> None:
        if self._trainer is not None:
            self._trainer.stop()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop, or asyncio's where there is no uvloop, which is said."""
    if uvloop is None:
        print("parablock: uvloop is not installed here; using asyncio's own event loop", file=sys.stderr)
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _complain(error: Exception) -> int:
    print(f"parablock worker: {error}", file=sys.stderr)
    return EXIT_INPUT


def _come_back(error: DiskError) -> int:
    print(f"parablock worker: {error}. When that has been put right, the same command goes on", file=sys.stderr)
    return EXIT_LATER


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"a whole number of threads, 0 for the default; got {text!r}")
    return int(text)


def _epsilon(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"an epsilon above 0, as 8 or 0.5; got {text!r}")
    return float(text)


def _summed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 2 <= int(text) <= MAX_SUMMED:
        raise argparse.ArgumentTypeError(f"a number of clients from 2 to {MAX_SUMMED}; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"a number of seconds, as 90 or 1800; got {text!r}")
    return float(text)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"a shard is I/N with I from 0 to N-1, as 0/2 and 1/2; got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
