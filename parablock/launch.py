"""`parablock run CONFIG.toml --workers N`: the broker and N workers as processes of this machine, until all have ended.

The broker keeps the terminal; the workers write to `logs/` in the run's folder. All of them have throw-away keys, in
`keys/` there until the run is complete. Whatever ends this command ends them,
and `parablock run --resume RUN` goes on. Where the workers do not just take turns at the rows, or a field labels them,
who gets what is shown first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from parablock import config as settings
from parablock import launch_file, throw_away
from parablock.folder_lock import holder
from parablock.journal import Journal
from parablock.keys import SECRET
from parablock.launch_file import LaunchFile
from parablock.run_folder import (
    CONFIG,
    ENDPOINT,
    INVITE,
    JOURNAL,
    KEYS,
    LAUNCH,
    LOGS,
    METRICS,
    PARTITION_PLOT,
    WORKERS,
    RunFolder,
    RunFolderError,
    how_to_go_on,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from parablock.config import Config

EXIT_FAILED, EXIT_INPUT, EXIT_REFUSED, EXIT_LATER = 1, 2, 3, 75
_GRACE_S = 15.0
_POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="parablock run", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without one, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key; may be repeated")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="workers, each with its share of the rows (default: 2)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/ and the present time)")
    parser.add_argument("--device", help="the workers' device: cpu, cuda, cuda:N or auto (default)")
    shared = "torch threads of each worker (default: this machine's cores, shared out)"
    parser.add_argument("--threads", type=int, metavar="N", help=shared)
    resumed = "go on with the run in this folder, as it was begun; --set, --device and --threads may be given"
    parser.add_argument("--resume", type=Path, metavar="RUN", help=resumed)
    arguments = parser.parse_args(argv)
    if arguments.workers is not None and arguments.workers < 1:
        print(f"parablock run: --workers is at least 1, got {arguments.workers}", file=sys.stderr)
        return EXIT_INPUT
    if arguments.threads is not None and arguments.threads < 1:
        print(f"parablock run: --threads is at least 1, got {arguments.threads}", file=sys.stderr)
        return EXIT_INPUT
    try:
        launch = _begun(arguments) if arguments.resume is None else _resumed(arguments)
    except ValueError as error:
        print(f"parablock run: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        return _refused(arguments.resume, error)
    return launch.run()


def _begun(arguments: argparse.Namespace) -> Launch:
    """The launch of a new run. Raises ConfigError."""
    workers = arguments.workers or 2
    # One machine needs no fixed port, and waits for exactly the workers that it starts.
    here = ["network.bind=tcp://127.0.0.1:*", f"round.clients={workers}"]
    config = settings.load(arguments.config, [*here, *arguments.set])
    if config.round.clients != workers:
        raise settings.ConfigError(
            f"--workers is {workers}, and round.clients {config.round.clients}: `parablock run` starts every client of "
            "a run, and no other; leave round.clients out"
        )
    out = arguments.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    return Launch(config, out, workers, arguments.device or "auto", arguments.threads)


def _resumed(arguments: argparse.Namespace) -> Launch:
    """The launch of a run that goes on. Raises ValueError where it cannot, OSError where the disk refuses."""
    for name in ("config", "workers", "out"):
        if getattr(arguments, name) is not None:
            raise RunFolderError(f"--resume goes on with the run as it was begun; leave {name} out, or begin a new run")
    folder = RunFolder.open(arguments.resume)
    config = settings.load(folder.path / CONFIG, arguments.set)
    told = launch_file.read(folder.path, config.round.clients)
    device, threads = arguments.device or told.device, arguments.threads or told.threads
    return Launch(config, folder.path, told.workers, device, threads, resume=tuple(arguments.set))


class Launch:
    """A broker and its workers, as child processes. threads: torch's in each worker; None: the cores, shared out.

    resume: what is set for a run that goes on, as KEY=VALUE; None: it is a new one.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        workers: int,
        device: str = "auto",
        threads: int | None = None,
        *,
        resume: Sequence[str] | None = None,
    ) -> None:
        self._resume = resume
        self._config = config
        self._out = out
        self._count = workers
        self._device = device
        self._threads = threads or max((os.cpu_count() or 1) // workers, 1)
        self._shards: subprocess.Popen[bytes] | None = None
        self._pairs: subprocess.Popen[bytes] | None = None
        self._broker: subprocess.Popen[bytes] | None = None
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self._made = False  # whether this has made the folder
        self._signalled = 0
        self._told: set[int] = set()  # children that a signal was passed on to

    def run(self) -> int:
        """The broker's exit code, or that of the worker that ended the run (2: wrong input; 3: refused; 1: a bug)."""
        try:
            self._check_place()
            if self._resume == () and self._is_over():
                said = f"{self._out} is complete: each of its {self._config.rounds} rounds is committed"
                throw_away.remove(self._out / KEYS)
                print(f"{said}. {_next(self._out)}")
                return 0
        except ValueError as error:
            print(f"parablock run: {error}", file=sys.stderr)
            return EXIT_INPUT
        except OSError as error:
            return _refused(self._out, error)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self._resume is None and (code := self._prepare()) != 0:
                return code
            if (code := self._make_keys()) != 0:
                if self._resume is None:
                    self._take_back()
                return code
            listens = self._start_broker()
            if listens:
                self._start_workers()
            code = self._wait()
            if not listens and self._resume is None:
                self._take_back()
            if code == 0:
                self._end()
                self._throw_away(self._out / KEYS)
            return code
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _check_place(self) -> None:
        """Here as well as in the broker: an old run's endpoint is not waited at, and its logs are not written over.

        Raises RunFolderError, and OSError where the disk refuses.
        """
        if self._resume is None:
            RunFolder.check_free(self._out)
        otherwise = "choose another --out" if self._resume is None else "move it away"
        for folder in self._keys:
            throw_away.check_ours(folder, otherwise)
        if self._resume is None:
            return
        RunFolder(self._out).check_unlocked()
        owners = {name: holder(self._out / WORKERS / name) for name in self._names()}
        alive = [f"{name}: {owner}" for name, owner in owners.items() if owner is not None]
        if alive:
            raise RunFolderError(
                f"workers of {self._out} still wait for its broker ({'; '.join(alive)}); end them "
                "(`kill`, with their processes' numbers) and give the same command again, or let them go on with "
                f"`parablock broker --resume {self._out}`"
            )

    def _is_over(self) -> bool:
        """Whether every round is committed and in the record, and no worker has left anything to come back to.

        Raises JournalError, RunFolderError, and OSError where the disk refuses.
        """
        if (self._out / WORKERS).exists():
            return False
        with Journal.open(self._out / JOURNAL, read_only=True) as journal:
            if journal.next_round < self._config.rounds:
                return False
            told = {row["round"] for row in RunFolder(self._out).read_metrics() if row["kind"] == "round"}
            return all(entry.round in told for entry in journal.entries())

    def _prepare(self) -> int:
        """What comes before the broker of a new run; the exit code.

        A run that is killed from here on goes on, as it is known with which workers.
        """
        try:
            self._made = not self._out.exists()
            if self._config.partition.shown and (code := self._show_shards()) != 0:
                return code
            RunFolder.make(self._out)
            (self._out / ENDPOINT).unlink(missing_ok=True)  # of a run whose other files were removed
            LaunchFile(self._count, self._device, self._threads).write(self._out)
        except RunFolderError as error:
            print(f"parablock run: {error}", file=sys.stderr)
            return EXIT_INPUT
        except OSError as error:
            return _refused(self._out, error)
        return 0

    @property
    def _keys(self) -> tuple[Path, Path]:
        """Where the run's keys are, and where they are being made."""
        return self._out / KEYS, self._out / f".{KEYS}.partial"

    def _make_keys(self) -> int:
        """A pair for the broker and each worker, and the broker's list of those; the exit code.

        A run that goes on has them, whole or not at all. A process makes them, as the core knows nothing of libzmq.
        """
        folder, partial = self._keys
        try:
            if self._resume is not None and folder.exists():
                return 0
            for old in self._keys:
                throw_away.remove(old)
                throw_away.check_ours(old, "choose another --out")  # something else was in it
            command = [sys.executable, "-P", "-m", "broker.pairs", str(partial), *self._names()]
            self._pairs = subprocess.Popen(command, process_group=0)
            self._catch_up(self._pairs)
            code = self._pairs.wait()
            if code == 0 and not self._signalled:
                partial.rename(folder)
            else:
                throw_away.remove(partial)
            if code < 0 and not self._signalled:
                ended = signal.Signals(-code).name
                print(f"parablock run: making keys was ended by {ended}; {how_to_go_on(self._out)}", file=sys.stderr)
        except RunFolderError as error:
            print(f"parablock run: {error}", file=sys.stderr)
            return EXIT_INPUT
        except OSError as error:
            self._throw_away(partial)
            return _refused(self._out, error)
        return EXIT_LATER if code < 0 or self._signalled else code

    def _throw_away(self, folder: Path) -> None:
        try:
            throw_away.remove(folder)
        except OSError as error:
            print(f"parablock run: delete {folder}, which the disk refuses: {error}", file=sys.stderr)

    def _take_back(self) -> None:
        """Leave nothing of a run that the broker has not begun."""
        if not (self._out / CONFIG).exists():
            (self._out / LAUNCH).unlink(missing_ok=True)
            self._throw_away(self._out / KEYS)
            if self._made:
                with contextlib.suppress(OSError):  # the shards' plot is in it
                    self._out.rmdir()

    def _names(self) -> list[str]:
        return [f"worker-{index}" for index in range(self._count)]

    def _show_shards(self) -> int:
        """Print who has which rows, and keep it in the run's folder; the exit code of `parablock shards`, or 75 where
        a signal came.

        A process, as the core reads no rows; each worker works the same shards out for itself.
        """
        command = [sys.executable, "-P", "-m", "parablock.cli", "shards", "--workers", str(self._count)]
        command += ["--out", str(self._out / PARTITION_PLOT), *_sets(self._config)]
        self._shards = subprocess.Popen(command, process_group=0)
        self._catch_up(self._shards)
        code = self._shards.wait()
        if code < 0 and not self._signalled:
            print(
                f"parablock run: parablock shards was ended by {signal.Signals(-code).name}; {how_to_go_on(self._out)}",
                file=sys.stderr,
            )
        return EXIT_LATER if code < 0 or self._signalled else code

    def _start_broker(self) -> bool:
        """Start it and wait until it listens; false if it ended instead (it has said why)."""
        command = [sys.executable, "-P", "-m", "broker", "--keys", str(self._out / KEYS)]
        if self._resume is None:
            command += ["--out", str(self._out), *_sets(self._config)]
        else:
            command += ["--resume", str(self._out), *(f"--set={line}" for line in self._resume)]
            if self._config.network.bind.endswith(":*"):  # the workers are started anew, and are told
                command.append("--any-port")
        before = self._listened()
        # A process group of its own: Ctrl-C reaches the children through `_on_signal`, once, and not by the terminal.
        self._broker = subprocess.Popen(command, process_group=0)
        self._catch_up(self._broker)
        while self._broker.poll() is None and not self._signalled:
            if self._endpoint() and self._listened() != before:
                return True
            time.sleep(_POLL_S)
        return False

    def _listened(self) -> int | None:
        """When a broker has last said where it listens; None: none has."""
        try:
            return (self._out / ENDPOINT).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _endpoint(self) -> str:
        """Where the broker listens; "" until it has written the whole line."""
        try:
            line = (self._out / ENDPOINT).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        return line.strip() if line.endswith("\n") else ""

    def _start_workers(self) -> None:
        logs = self._out / LOGS
        logs.mkdir(exist_ok=True)
        for index, name in enumerate(self._names()):
            if self._signalled:
                return
            command = [sys.executable, "-P", "-m", "workers", "--invite", str(self._out / INVITE), "--name", name]
            command += ["--key", str(self._out / KEYS / f"{name}{SECRET}")]
            command += [f"--data={self._config.data.train}", f"--eval={self._config.data.eval}"]
            command += ["--shard", f"{index}/{self._count}", "--threads", str(self._threads), "--device", self._device]
            command += ["--state", str(self._out / WORKERS / name)]
            if self._config.trust_remote_code:
                command.append("--trust-remote-code")
            if self._config.eval.task:  # told to nobody but a broker on this machine
                command.append("--tell-tasks")
            log = (logs / f"{name}.log").open("ab")
            self._logs.append(log)
            # As many numpy threads as torch threads: the cores are shared out once.
            threads = str(self._threads)
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
            self._workers[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
            )
            self._catch_up(self._workers[name])

    def _wait(self) -> int:
        """Until the broker has ended. A worker that fails meanwhile is shown.

        It ends the run, unless that can go on without it: it had begun, and a quorum is left.
        """
        assert self._broker is not None
        shown: set[str] = set()
        worst, ended = 0, False
        while self._broker.poll() is None:
            for name, process in self._workers.items():
                code = process.poll()
                if code is not None and code != 0 and name not in shown and not self._signalled and not ended:
                    shown.add(name)
                    worst = max(worst, code if code in (EXIT_INPUT, EXIT_REFUSED) else EXIT_FAILED)
                    print(f"parablock run: {name} ended with exit code {code}:\n{self._tail(name)}", file=sys.stderr)
            begun = (self._out / METRICS).exists()
            left = len(self._workers) - len(shown)
            hopeless = worst > EXIT_FAILED or not begun or left < self._config.quorum
            if shown and hopeless and not ended and not self._signalled:
                ended = True
                self._broker.terminate()  # and then the other workers, which would wait for it
            time.sleep(_POLL_S)
        if self._broker.returncode < 0 and not self._signalled and not ended:
            name = signal.Signals(-self._broker.returncode).name
            print(f"parablock run: the broker was ended by {name}; {how_to_go_on(self._out)}", file=sys.stderr)
        if ended:
            if worst == EXIT_INPUT and not (self._out / METRICS).exists():
                may_change = ", ".join(sorted(settings.MAY_CHANGE))
                print(
                    f"parablock run: a run that goes on may have other values of {may_change}; to change anything "
                    f"else, begin anew: choose another --out, or delete {shlex.quote(str(self._out))}",
                    file=sys.stderr,
                )
            return worst
        return self._broker.returncode if self._broker.returncode >= 0 else EXIT_LATER

    def _tail(self, name: str) -> str:
        text = (self._out / LOGS / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(f"  {line}" for line in text.splitlines()[-15:])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Pass it on: the children end in good order at the first one, and at once at the second."""
        self._signalled += 1
        for process in self._children():
            self._told.add(process.pid)
            process.send_signal(number)

    def _catch_up(self, process: subprocess.Popen[bytes]) -> None:
        """A signal may have come while the child was being made, and not have reached it."""
        if self._signalled and process.pid not in self._told:
            self._told.add(process.pid)
            process.terminate()

    def _children(self) -> list[subprocess.Popen[bytes]]:
        processes = [self._shards, self._pairs, self._broker, *self._workers.values()]
        return [process for process in processes if process is not None and process.poll() is None]

    def _end(self) -> None:
        """Nothing stays behind: ask where nobody has, wait, and kill what does not listen."""
        if self._broker is None or self._broker.poll() != 0:
            for process in self._children():
                if process.pid not in self._told:
                    process.terminate()  # a broker that failed has told its workers nothing
        deadline = time.monotonic() + _GRACE_S
        while self._children() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for process in self._children():
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()
        with contextlib.suppress(OSError):  # a worker may have had to leave something there to come back to
            (self._out / WORKERS).rmdir()


def _refused(out: Path, error: OSError) -> int:
    print(f"parablock run: {error}; when the disk no longer refuses, {how_to_go_on(out)}", file=sys.stderr)
    return EXIT_LATER


def _next(out: Path) -> str:
    """What a complete run is for."""
    run = shlex.quote(str(out))
    return f"Next: parablock report {run}, parablock evaluate {run} --data FILE, parablock export {run}"


def _sets(config: Config) -> list[str]:
    """The whole config as arguments of another command."""
    return [f"--set={line}" for line in _overrides(config)]


def _overrides(config: Config) -> list[str]:
    """The whole config as KEY=VALUE lines."""
    lines = []
    for name, value in settings.to_dict(config).items():
        if isinstance(value, dict):
            lines += [f"{name}.{key}={settings.toml_value(entry)}" for key, entry in value.items()]
        else:
            lines.append(f"{name}={settings.toml_value(value)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
