"""The run folder: what a run leaves on disk, and how it is read back.

    runs/NAME/
        config.toml     every setting as resolved
        manifest.json   which parameter belongs to which block, and which run and base model this is
        journal.sqlite  every committed round (parablock.journal)
        journal.sqlite.witness  how far the journal had come (parablock.witness)
        blocks/         versions of each block, with the server's state of them (parablock.block_versions)
        lock            which process is at work here (parablock.folder_lock)
        endpoint        where it listens, or did; invite.toml: the same for workers, with its public key
        keys/           throw-away keys of a run that `parablock run` has begun, until it is complete
        launch.json     with which workers `parablock run` goes on; workers/ what they keep, logs/ what they say
        metrics.jsonl   one object per round or evaluation
        events.jsonl    one object per thing that happened
        trace.json      who did what when (parablock.trace)
        partition.json  which worker has how many rows of which label, and partition.png the plot of it: from
                        `parablock run`, where partition.method is not iid
        report/         the page that `parablock report` writes
        model/          what `parablock export` writes

It makes the folder and appends to the two logs. What the rows mean, and when a round is committed, are not its
business.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parablock import config as settings
from parablock.append_file import AppendFile, cut_torn_line
from parablock.block_file import BlockFileError, StoredBlock
from parablock.block_versions import BlockVersions
from parablock.folder_lock import FolderLock, LockedError, holder
from parablock.manifest import Block, Manifest, Slot
from parablock.network import check_endpoint
from parablock.placement import write_text
from parablock.shards import ShardCounts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from parablock.config import Config

logger = logging.getLogger(__name__)

CONFIG = "config.toml"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
TRACE = "trace.json"
PARTITION = "partition.json"
PARTITION_PLOT = "partition.png"
BLOCKS = "blocks"
JOURNAL = "journal.sqlite"
ENDPOINT = "endpoint"
INVITE = "invite.toml"
KEYS = "keys"
LAUNCH = "launch.json"
WORKERS = "workers"
LOGS = "logs"

_NEVER = frozenset(
    {
        errno.EACCES, errno.EEXIST, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
        errno.EPERM, errno.EROFS,
    }
)  # fmt: skip


class RunFolderError(ValueError):
    """A run folder cannot be made or read. The message names the path and says what to do."""


class RunFolder:
    """An open run folder. One process writes to it; any number may read, also while it is being written."""

    def __init__(self, path: Path) -> None:
        """Use `create` or `open`; this checks nothing."""
        self.path = path
        self.blocks = BlockVersions(path / BLOCKS)
        self._logs: dict[str, AppendFile] = {}
        self._lock: FolderLock | None = None

    @classmethod
    def create(cls, path: Path | str, config: Config) -> RunFolder:
        """Make the folder of a new run and write its config. An existing folder without a run in it is fine.

        Raises RunFolderError where `path` already holds a run, is a file, or no folder can be made there; OSError where
        the disk refuses, and then no run is left there.
        """
        path = Path(path)
        cls.check_free(path)
        cls.make(path)
        try:
            # Exclusive: of two brokers given the same folder at the same moment, one is refused.
            file = (path / CONFIG).open("x", encoding="utf-8")
        except FileExistsError as error:
            raise _already_a_run(path, CONFIG) from error
        except OSError as error:
            raise _misplaced(path, error) from error
        try:
            with file:
                file.write(settings.to_toml(config))
                file.flush()
                os.fsync(file.fileno())
            (path / BLOCKS).mkdir()
        except OSError:
            (path / CONFIG).unlink()
            raise
        return cls(path)

    def discard(self) -> None:
        """Remove what has been written of a run that has no journal yet, and so has not begun: the folder is free.

        What was there before the run stays. Raises OSError where the disk refuses.
        """
        assert not (self.path / JOURNAL).exists(), "what is journaled is a run, and is kept"
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path / BLOCKS)
        for name in (MANIFEST, CONFIG):  # the one by which it is known last
            (self.path / name).unlink(missing_ok=True)

    @staticmethod
    def make(path: Path) -> None:
        """Make the folder, if it is not there. Raises as `create` does."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _misplaced(path, error) from error

    @staticmethod
    def check_free(path: Path | str) -> None:
        """Raise RunFolderError where `path` cannot become a new run's folder: it is a file, or holds a run."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, not a folder; choose another --out")
        for name in (CONFIG, METRICS, EVENTS, TRACE, JOURNAL, BLOCKS):
            if (path / name).exists():
                raise _already_a_run(path, name)

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The folder of a finished or running run. Raises RunFolderError where there is none."""
        path = Path(path)
        if not path.exists():
            raise RunFolderError(f"there is no run folder {path}; give the folder that the run's --out named")
        if not (path / CONFIG).is_file():
            raise RunFolderError(
                f"{path} is not a run folder (it has no {CONFIG}); give the folder that the run's --out named"
            )
        return cls(path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lock(self, since: str, kind: str = "a broker") -> None:
        """Be the only one at work here until `close`. since: the present time, and kind: what this is, for people.

        Raises RunFolderError where another one is, OSError where the disk refuses.
        """
        try:
            self._lock = FolderLock(self.path, since, kind)
        except LockedError as error:
            raise RunFolderError(str(error)) from error

    def check_unlocked(self) -> None:
        """Raise RunFolderError where somebody is at work here, OSError where the disk refuses."""
        if (owner := holder(self.path)) is not None:
            raise RunFolderError(f"{self.path} is in use by {owner}; stop that first, or wait until it has ended")

    def close(self) -> None:
        """Close the logs, and let others in. Reading still works; another append opens the logs again."""
        for file in self._logs.values():
            file.close()
        self._logs.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def trace_path(self) -> Path:
        return self.path / TRACE

    @property
    def report_path(self) -> Path:
        return self.path / "report" / "index.html"

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    def write_config(self, config: Config) -> None:
        """Replace the settings by those of a run that goes on with others. Raises OSError where the disk refuses."""
        write_text(self.path / CONFIG, settings.to_toml(config))

    def config(self) -> Config:
        """The settings of the run. Raises ConfigError where the file was damaged or edited into nonsense."""
        return settings.load(self.path / CONFIG)

    def shard_counts(self) -> ShardCounts | None:
        """How the rows were divided over the workers; None where nobody kept it. Raises RunFolderError."""
        path = self.path / PARTITION
        try:
            return ShardCounts.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{path} is damaged: {error!r}; delete it, or let `parablock shards` write it anew"
            ) from error

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl. NaN and infinities are written as null."""
        self._append(METRICS, row)

    def append_event(self, row: Mapping[str, Any]) -> None:
        """Append one object to events.jsonl. NaN and infinities are written as null."""
        self._append(EVENTS, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl in order; a last row that was cut off is left out, with a logged warning.

        Raises RunFolderError for any other line that is not a JSON object.
        """
        return self._read(METRICS)

    def read_events(self) -> list[dict[str, Any]]:
        """All rows of events.jsonl, read as `read_metrics` reads."""
        return self._read(EVENTS)

    def recorded_until(self) -> float:
        """The newest time in events.jsonl, in seconds from the run's beginning; 0 without one.

        Raises as `read_events` does, and where a row says no time.
        """
        newest = 0.0
        for number, event in enumerate(self.read_events(), start=1):
            time_s = event.get("time_s", "nothing")
            if time_s is not None and (isinstance(time_s, bool) or not isinstance(time_s, int | float)):
                raise RunFolderError(
                    f"{self.path / EVENTS}, line {number} says no time: time_s is a number of seconds, got {time_s!r}; "
                    "mend or delete it"
                )
            newest = max(newest, time_s or 0.0)
        return newest

    def endpoint(self) -> str | None:
        """Where the newest broker listens, or did, as its clients know it; None: nobody said.

        Raises RunFolderError where the file holds no endpoint, OSError where it cannot be read.
        """
        path = self.path / ENDPOINT
        try:
            endpoint = path.read_text(encoding="utf-8").strip()
            check_endpoint(endpoint)
        except FileNotFoundError:
            return None
        except ValueError as error:  # of no UTF-8 either
            raise RunFolderError(
                f"{path} is damaged: {error}; write into it where the broker listened, as its workers know it, or "
                "delete it to listen where network.bind says"
            ) from error
        return endpoint

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        file = self._logs.get(name)
        if file is None:
            path = self.path / name
            if path.exists() and (torn := cut_torn_line(path)):
                logger.warning("%s: its last line was cut off and is dropped (%d bytes)", path, torn)
            file = self._logs[name] = AppendFile(path)
        file.append(json.dumps(_finite(row), allow_nan=False, ensure_ascii=False) + "\n")

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
        # A row and its newline are one write, so what follows the last newline is a row that was cut off.
        *complete, torn = lines
        if torn:
            logger.warning("%s: its last line was cut off and is left out (%d bytes)", path, len(torn))
        rows = []
        for number, line in enumerate(complete, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RunFolderError(f"{path}, line {number} is not valid JSON ({error}); mend or delete it") from error
            if not isinstance(row, dict):
                raise RunFolderError(f"{path}, line {number} is not a JSON object; mend or delete it")
            rows.append(row)
        return rows

    def write_manifest(self, manifest: Manifest, weights: str = "", *, tokenizer: str = "", run: str = "") -> None:
        """Keep the partition of the model (names, shapes, offsets) for people and for tools, and what run this is.

        weights, tokenizer: digests of the base model (`parablock.models`), by which an export and the broker's door
        know it again; "" where unknown. run: its id.
        """
        facts = {"digest": manifest.digest, "weights": weights, "tokenizer": tokenizer, "run": run}
        write_text(self.path / MANIFEST, json.dumps({**facts, **asdict(manifest)}, indent=1))

    @property
    def has_manifest(self) -> bool:
        """Whether `write_manifest` was called: not in a run whose broker ended while it made the folder."""
        return (self.path / MANIFEST).exists()

    def manifest(self) -> Manifest:
        """The partition that `write_manifest` kept. Raises RunFolderError where it is missing or damaged."""
        return self._read_manifest()[0]

    def weights_digest(self) -> str:
        """What `write_manifest` was told of the base model's weights. Raises as `manifest` does."""
        return self._read_manifest()[1]["weights"]

    def run_facts(self) -> dict[str, str]:
        """`run`, `weights` and `tokenizer`, as `write_manifest` was told them. Raises as `manifest` does."""
        return self._read_manifest()[1]

    def _read_manifest(self) -> tuple[Manifest, dict[str, str]]:
        path = self.path / MANIFEST
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            blocks = tuple(
                Block(block["index"], block["name"], tuple(_slot(slot) for slot in block["slots"]))
                for block in tree["blocks"]
            )
            manifest = Manifest(blocks, tuple(tree["frozen"]))
            facts = {name: str(tree[name]) for name in ("run", "weights", "tokenizer")}
            intact = manifest.digest == tree["digest"]
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{path} is damaged: {error!r}; take it from a backup of the run") from error
        if not intact:
            raise RunFolderError(f"{path} is damaged: its digest does not match; take it from a backup of the run")
        return manifest, facts

    def read_blocks(self) -> Iterator[StoredBlock]:
        """Every block by rising index as its newest version, one in memory at a time.

        Raises RunFolderError, naming the file, where one is damaged.
        """
        try:
            yield from self.blocks.newest()
        except BlockFileError as error:
            raise RunFolderError(str(error)) from error

    def load_blocks(self) -> dict[int, tuple[int, npt.NDArray[np.float32]]]:
        """Version and values of every stored block, by its index. Raises as `read_blocks` does."""
        return {block.label.index: (block.label.version, block.values) for block in self.read_blocks()}


def how_to_go_on(path: Path, door: Sequence[str] = ()) -> str:
    """What to do about a run that ended before it was complete, as a sentence without its stop. door: the options by
    which its broker had clients let in; `parablock run` needs none."""
    if (path / JOURNAL).exists():
        command, options = ("run", ()) if (path / LAUNCH).exists() else ("broker", door)
        return f"go on with it: parablock {command} {shlex.join(['--resume', str(path), *options])}"
    if (path / CONFIG).exists():
        return f"the run had not begun: delete {shlex.quote(str(path))}, and give the same command again"
    return "the run had not begun: give the same command again"


def _misplaced(path: Path, error: OSError) -> OSError | RunFolderError:
    """A place that will never do is the user's to change; a disk that refuses may do later."""
    if error.errno not in _NEVER:
        return error
    return RunFolderError(f"cannot write the run folder {path}: {error.strerror}; choose another --out")


def _already_a_run(path: Path, name: str) -> RunFolderError:
    return RunFolderError(
        f"{path} already holds a run ({name}); go on with it by --resume {path}, choose another --out, or delete it"
    )


def _slot(tree: dict[str, Any]) -> Slot:
    return Slot(tree["name"], tuple(tree["shape"]), tree["dtype"], tree["offset"])


def _finite(value: Any) -> Any:
    """The same value with null for what JSON has no number for."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
