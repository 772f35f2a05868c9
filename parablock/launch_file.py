"""`launch.json`: with which workers `parablock run` has begun a run, so that `--resume` goes on with the same ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from parablock.placement import write_text
from parablock.run_folder import LAUNCH

if TYPE_CHECKING:
    from pathlib import Path


class LaunchFileError(ValueError):
    """The file is not there, or damaged. The message names it and says what to do."""


@dataclass(frozen=True)
class LaunchFile:
    """workers: how many, each with its share of the rows. threads: torch's in each of them."""

    workers: int
    device: str
    threads: int

    def write(self, folder: Path) -> None:
        """Raises OSError where the disk refuses."""
        write_text(folder / LAUNCH, json.dumps(asdict(self)) + "\n")


def read(folder: Path, clients: int) -> LaunchFile:
    """clients: how many the run has, by its settings. Raises LaunchFileError, and OSError where the disk refuses."""
    path = folder / LAUNCH
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        told = LaunchFile(_whole(tree["workers"]), str(tree["device"]), _whole(tree["threads"]))
    except FileNotFoundError as error:
        raise LaunchFileError(
            f"{folder} was not begun by `parablock run`; go on with it by `parablock broker --resume {folder}`, and "
            "its workers by themselves"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchFileError(
            f"{path} is damaged: {error!r}; it holds workers, device and threads, as in "
            f'{{"workers": {clients}, "device": "auto", "threads": 1}}'
        ) from error
    if told.workers != clients:
        raise LaunchFileError(
            f"{path} tells of {told.workers} workers, and the run's settings of {clients} (round.clients): with other "
            f"shares of the rows it would be another run; restore the file, or set its workers to {clients}"
        )
    return told


def _whole(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a whole number of at least 1, got {value!r}")
    return value
