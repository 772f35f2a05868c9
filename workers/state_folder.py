"""The worker's folder: what of a worker outlives its process, as files that one process at a time reads and writes.

    worker.json                         whose it is: name, run, manifest
    position.safetensors                the round that comes next, the counters, and which of the files below go with it
    blocks/0003.safetensors             a block as it landed, with the α that was learnt of it
    contributions/000018.safetensors    what a round made of its block, until the broker's version of that has landed;
                                        and what that block was before, where it has not landed before
    residuals/0003-000018.safetensors   what the codec lost of a block's contributions, through that round's
    optimizer/0003-000018.safetensors   what the optimizer has learnt of a block, through that round
    released/RUN.safetensors            what has left of the data in a run, where that costs some of its privacy budget

Everything of a round is written before the position says that it is behind: whenever the process dies, what is of a
round that the position has not passed is as if it had never been, and is trained again; and what an older position
named is kept until a newer one is there. Nothing is waited for to be on the disk itself, but for what is said to have
left: after a power cut a checksum tells what is lost, and that is pulled or begun anew. What has left in a run stays
when all else of it goes, or is put aside: whoever comes back to that run goes on with what is left of the budget. All
of it is private, as the contributions are derived from text.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from parablock import folder_lock, placement, tensor_file
from parablock.folder_lock import FolderLock, LockedError
from parablock.tensor_file import TensorFileError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from parablock.tensor_file import Reader, Tensors

    Vector = npt.NDArray[np.float32]

log = logging.getLogger("worker")

_FORMAT = 2
_IDENTITY, _POSITION, _RELEASED = "worker.json", "position.safetensors", "released"
_BLOCKS, _CONTRIBUTIONS, _RESIDUALS, _OPTIMIZER = "blocks", "contributions", "residuals", "optimizer"
_FOLDERS = (_BLOCKS, _CONTRIBUTIONS, _RESIDUALS, _OPTIMIZER)
_SUFFIX = ".safetensors"
BLOCK, DELTA, START = "block", "delta", "start"
"""Names of vectors in a block's file, and in a contribution's."""
_UNFIT = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
)
"""What the system says of a place that is no place for such a folder."""
_FILE = re.compile(rf"[0-9]+(-[0-9]+)?{re.escape(_SUFFIX)}")
_PARTIAL_IDENTITY, _ASIDE = f".{_IDENTITY}.partial", "aside-"


class StateError(ValueError):
    """The folder cannot be used. The message names it and says what to do."""


class DiskError(Exception):
    """The disk or the system refuses just now, which says nothing about what the folder holds. The message names it."""


@dataclass(frozen=True)
class Identity:
    """Whose the folder is. manifest: `Manifest.digest`."""

    name: str
    run: str
    manifest: str


@dataclass(frozen=True)
class LandedBlock:
    """A block as it landed. round: that made it. alpha: by tensor, None where it is not learnt; None: of none of them.

    alone: nobody else had contributed to anything. position: the round that came next. miss: as in `flight.Landing`.
    """

    block: int
    round: int
    alpha: tuple[float | None, ...] | None
    alone: bool
    position: int
    miss: float


@dataclass(frozen=True)
class Contribution:
    """What a round made. offered: or else the round was closed before. alpha: of the guess that stands for it.

    built_on: the round that had made the version that it began with, −1: the base model; None: it began with a guess.
    """

    round: int
    block: int
    weight: int
    steps: int
    loss: float
    offered: bool
    alpha: tuple[float, ...]
    built_on: int | None


@dataclass(frozen=True)
class Position:
    """round: the first that is neither trained nor passed. surplus: steps taken beyond `solver.steps` a round.

    astray: the guard has it that the next round waits for all before it. clients: how many there were at the start.
    contributions: the blocks of those that are open, by round. residuals, optimizer: by block, the round through which
    they go.
    """

    round: int
    surplus: int = 0
    astray: bool = False
    clients: int = 1
    contributions: Mapping[int, int] = field(default_factory=dict)
    residuals: Mapping[int, int] = field(default_factory=dict)
    optimizer: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Released:
    """through: the last round a contribution to which may have left, −1: none has. spent: Σ 1/z² of those that have,
    each with the noise multiplier z that it left with."""

    through: int = -1
    spent: float = 0.0


@dataclass(frozen=True)
class Spooled:
    """An open contribution. delta: float32 of shape (numel,). chunks: as a lossy codec has encoded it."""

    made: Contribution
    delta: Vector
    chunks: tuple[npt.NDArray[np.uint8], ...]


@dataclass(frozen=True)
class State:
    """What an earlier process has left. position: None where that is not known.

    blocks, optimizer: what of which block is whole in the folder, from where each is read when it is needed.
    """

    position: Position | None
    blocks: Mapping[int, LandedBlock]
    contributions: Mapping[int, Spooled]
    residuals: Mapping[int, Vector]
    optimizer: Collection[int]


class StateFolder:
    """Locked for this process from the beginning to `close`. All writing raises OSError where the disk refuses."""

    def __init__(self, path: Path, within: Path | None = None) -> None:
        """Make the folder, if it is not there, and lock it. Raises StateError, also where it is something else's, and
        DiskError.

        within: the folders between that and this one go when they are empty.
        """
        self.path = path
        self._within = within
        with _using(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_ours(path)
            if path.stat().st_mode & 0o077:  # it was there before
                path.chmod(0o700)
            try:
                self._lock = FolderLock(path, kind="a worker", private=True)
            except LockedError as error:
                raise StateError(f"{error}, or choose another --state") from error

    def close(self) -> None:
        self._lock.release()

    @property
    def identity(self) -> Identity | None:
        """Whose the folder is; None where it does not say. Raises DiskError."""
        path = self.path / _IDENTITY
        try:
            with _reading(path):
                tree = json.loads(path.read_text(encoding="utf-8"))
            return Identity(tree["name"], tree["run"], tree["manifest"]) if tree["format"] == _FORMAT else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def begin(self, identity: Identity) -> State | None:
        """Make it this worker's; what an earlier process of this very worker has left in it, if anything.

        What was another run's is put aside, in a folder of its own. Raises StateError where it is another worker's, and
        DiskError.
        """
        found = self.identity
        holds = any((self.path / name).exists() for name in (_IDENTITY, _POSITION, *_FOLDERS))
        if found is not None and found.name != identity.name:
            raise StateError(
                f"{self.path} is the state of the worker {found.name!r}, not of {identity.name!r}; "
                "take part under that name, or choose another --state"
            )
        if holds and found != identity:
            self._put_aside(found)
        with _using(self.path):
            text = json.dumps({"format": _FORMAT, **asdict(identity)}, indent=1)
            temporary = self.path / _PARTIAL_IDENTITY
            temporary.unlink(missing_ok=True)  # with whatever mode it has
            temporary.touch(0o600)
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.path / _IDENTITY)  # first: what is in a folder without one is taken for a stranger's
            for name in _FOLDERS:
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
            return self._load() if holds and found == identity else None

    def _put_aside(self, found: Identity | None) -> None:
        if found is None:
            whose, place = "does not say whose it is, or is another version's", "unknown"
        else:
            whose, place = f"is of the run {found.run}", _named_after(found.run)
        aside = self.path / f"{_ASIDE}{place}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.path / f"{_ASIDE}{place}-{number}"
        with _using(self.path):
            aside.mkdir(mode=0o700)
            for name in (_POSITION, *_FOLDERS, _IDENTITY):  # whose it is says so until the rest has gone
                with contextlib.suppress(FileNotFoundError):
                    (self.path / name).replace(aside / name)
        log.warning("what %s holds %s; it is not used, and lies in %s", self.path, whose, aside)

    # Reading

    def _load(self) -> State:
        for folder in ("", *_FOLDERS):
            for partial in (self.path / folder).glob(f".[0-9p]*{_SUFFIX}.partial"):  # a process was killed as it wrote
                partial.unlink()
        position = self._position()
        blocks = self._landed()
        if position is None:
            for name in (_CONTRIBUTIONS, _RESIDUALS, _OPTIMIZER):
                self._clear(name, but=())
            return State(None, blocks, {}, {}, ())
        named = self._named(_RESIDUALS, position.residuals, "what the codec had lost of it")
        residuals = {block: tensors.vectors["residual"] for block, tensors in named}
        optimizer = [block for block, _ in self._named(_OPTIMIZER, position.optimizer, "its optimizer's state")]
        self._clear_passed(position)
        return State(position, blocks, self._spooled(position, blocks), residuals, optimizer)

    def _position(self) -> Position | None:
        path = self.path / _POSITION
        if not path.exists() and not self._files(_BLOCKS):
            return None  # killed in its first round
        tensors = self._read(path, "where the earlier process was is not known")
        if tensors is None:
            return None
        facts = dict(tensors.facts)
        for name in ("contributions", "residuals", "optimizer"):  # JSON's keys are texts
            facts[name] = {int(key): value for key, value in facts[name].items()}
        return Position(**facts)

    def _landed(self) -> dict[int, LandedBlock]:
        """All of them looked through; their values are read when they are needed, one at a time."""
        found = {}
        for path in self._files(_BLOCKS):
            if (tensors := self._read(path, "the block is pulled again")) is not None:
                landed = _landed_block(tensors.facts)
                found[landed.block] = landed
        return found

    def _spooled(self, position: Position, blocks: Mapping[int, LandedBlock]) -> dict[int, Spooled]:
        found = {}
        for path in self._files(_CONTRIBUTIONS):
            if _numbers(path)[0] >= position.round:
                path.unlink()  # the position has not passed it: it will be trained again
                continue
            if (tensors := self._read(path, "the round does without it")) is None:
                continue
            facts = {**tensors.facts, "alpha": tuple(tensors.facts["alpha"])}
            made = Contribution(**facts)
            if made.block in blocks and blocks[made.block].round >= made.round:
                path.unlink()  # what the broker made of it has landed
                continue
            names = sorted(name for name in tensors.vectors if name not in (DELTA, START))
            chunks = tuple(tensors.vectors[name] for name in names)
            found[made.round] = Spooled(made, tensors.vectors[DELTA], chunks)
        for round, block in position.contributions.items():
            landed = blocks[block].round if block in blocks else -1
            if round not in found and round > landed:
                log.warning("%s holds nothing of the contribution to round %d: it does without", self.path, round)
        return found

    def _named(self, folder: str, rounds: Mapping[int, int], what: str) -> Iterator[tuple[int, Tensors]]:
        """By block, one after the other."""
        for block, round in rounds.items():
            path = self._path(folder, block, round)
            if not path.exists():
                log.warning("%s is missing: of block %d, %s begins anew", path, block, what)
            elif (tensors := self._read(path, f"of block {block}, {what} begins anew")) is not None:
                yield block, tensors

    def block(self, block: int) -> Vector:
        """The values of a block that has landed. Raises TensorFileError, FileNotFoundError and DiskError."""
        path = self._path(_BLOCKS, block)
        with _reading(path):
            return tensor_file.read(path).vectors[BLOCK]

    def optimizer(self, block: int, round: int) -> Tensors:
        """What `OptimizerStates` had of a block after that round. Raises as `block` does."""
        path = self._path(_OPTIMIZER, block, round)
        with _reading(path):
            return tensor_file.read(path)

    def released(self, run: str) -> Released | None:
        """What has left so far in a run; None where that was never written. Raises StateError where it is damaged, and
        DiskError."""
        path = self._released(run)
        try:
            with _reading(path):
                return Released(**tensor_file.read(path).facts)
        except FileNotFoundError:
            return None
        except TensorFileError as error:
            raise StateError(
                f"{error}: what this worker has told of its data cannot be known any more, and may not be told twice; "
                f"restore {path} from a backup, or this worker's part in the run ends here"
            ) from error

    def _read(self, path: Path, consequence: str) -> Tensors | None:
        """None, which is said, where there is none or it is damaged; that one goes. Raises DiskError."""
        try:
            with _reading(path):
                return tensor_file.read(path)
        except FileNotFoundError:
            log.warning("%s is missing: %s", path, consequence)
        except TensorFileError as error:
            log.warning("%s: %s", error, consequence)
            path.unlink(missing_ok=True)
        return None

    # Writing

    def write_block(self, landed: LandedBlock, values: Vector) -> int:
        """Returns the bytes written, as all of these do."""
        return self._write(self._path(_BLOCKS, landed.block), {BLOCK: values}, asdict(landed))

    def write_contribution(
        self, made: Contribution, delta: Vector, chunks: Iterable[npt.NDArray[np.uint8]], start: Vector | None = None
    ) -> int:
        """start: what the block was before, for this process; another one has it from elsewhere."""
        vectors: dict[str, npt.NDArray[Any]] = {DELTA: delta}
        vectors |= {chunk_name(index): chunk for index, chunk in enumerate(chunks)}
        if start is not None:
            vectors[START] = start
        return self._write(self._contribution(made.round), vectors, asdict(made))

    def open_contribution(self, round: int) -> Reader:
        """What this process has written of it. Raises OSError, and DiskError where that is damaged."""
        return _opened(self._contribution(round))

    def open_block(self, block: int) -> Reader | None:
        """What was written of a block that has landed; None: nothing. Raises likewise."""
        path = self._path(_BLOCKS, block)
        return _opened(path) if path.exists() else None

    def drop_contribution(self, round: int) -> None:
        self._contribution(round).unlink(missing_ok=True)

    def _contribution(self, round: int) -> Path:
        return self._path(_CONTRIBUTIONS, round, width=6)

    def write_residual(self, block: int, round: int, residual: Vector) -> int:
        return self._write(self._path(_RESIDUALS, block, round), {"residual": residual}, {})

    def write_optimizer(self, block: int, round: int, state: Tensors) -> int:
        return self._write(self._path(_OPTIMIZER, block, round), state.vectors, state.facts)

    def write_released(self, run: str, released: Released) -> None:
        """On the disk itself when this returns."""
        path = self._released(run)
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700)
            placement.sync_folder(self.path)
        self._write(path, {}, asdict(released), synced=True)

    def _released(self, run: str) -> Path:
        return self.path / _RELEASED / f"{_named_after(run)}{_SUFFIX}"

    def write_position(self, position: Position) -> int:
        """All that it names is there. What an older one named goes."""
        written = self._write(self.path / _POSITION, {}, asdict(position))
        self._clear_passed(position)
        return written

    def remove(self) -> None:
        """The run is done, and nothing of it is needed any more, but what has left in it: it may be gone on with.

        Where there is any of that, or what is not ours, it stays, and the folder with it.
        """
        for name in _FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (_POSITION, _IDENTITY, folder_lock.NAME):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            self.path.rmdir()
            for parent in self.path.parents:
                if self._within is None or not parent.is_relative_to(self._within) or parent == self._within:
                    break
                parent.rmdir()

    def _write(
        self, path: Path, vectors: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any], *, synced: bool = False
    ) -> int:
        return tensor_file.write(path, vectors, facts, private=True, synced=synced)

    def _clear_passed(self, position: Position) -> None:
        self._clear(_RESIDUALS, but=position.residuals.items())
        self._clear(_OPTIMIZER, but=position.optimizer.items())

    def _clear(self, folder: str, but: Collection[tuple[int, int]]) -> None:
        for path in self._files(folder):
            if _numbers(path) not in but:
                path.unlink()

    def _files(self, folder: str) -> list[Path]:
        """Raises OSError, which `Path.glob` would pass over."""
        path = self.path / folder
        return sorted(path / name for name in os.listdir(path) if _FILE.fullmatch(name))

    def _path(self, folder: str, *numbers: int, width: int = 4) -> Path:
        first, *rest = numbers
        return self.path / folder / ("-".join([f"{first:0{width}d}", *(f"{n:06d}" for n in rest)]) + _SUFFIX)


def chunk_name(index: int) -> str:
    """Of a vector in a contribution's file: a chunk as noise or a lossy codec has made it."""
    return f"chunk.{index:06d}"


def _opened(path: Path) -> Reader:
    try:
        return tensor_file.Reader(path)
    except TensorFileError as error:
        raise DiskError(f"{error}, and was whole when it was written or read last") from error


@contextlib.contextmanager
def _using(path: Path) -> Iterator[None]:
    """An OSError is a StateError where another folder would do, and a DiskError where it is the disk or the system."""
    try:
        yield
    except OSError as error:
        why = f"cannot use {path}: {error.strerror or error}"
        if error.errno in _UNFIT:
            raise StateError(f"{why}; choose another --state, or none") from error
        raise DiskError(why) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """An OSError, but that there is no such file, is a DiskError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DiskError(f"cannot read {path}: {error.strerror or error}; it is left as it is") from error


def _check_ours(path: Path) -> None:
    """Raises StateError where the folder holds what no worker has put there, and does not say whose it is."""
    names = set(os.listdir(path))
    strange = sorted(
        name for name in names - {folder_lock.NAME, _PARTIAL_IDENTITY, _RELEASED} if not name.startswith(_ASIDE)
    )
    if strange and _IDENTITY not in names:
        raise StateError(
            f"{path} is no worker's state: it holds {strange[0]!r}, and no {_IDENTITY}; choose a folder that is new or "
            "empty as --state, or none"
        )


def _landed_block(facts: Mapping[str, Any]) -> LandedBlock:
    alpha = facts["alpha"]
    return replace(LandedBlock(**facts), alpha=None if alpha is None else tuple(alpha))


def _named_after(run: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", run)


def _numbers(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.stem.split("-")))
