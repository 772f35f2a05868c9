"""Many simulated runs, each a process of one thread, up to so many at a time.

The options that say so, and how far all are. What is run, and what is made of it, is the benchmark's own.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bench import simulation

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rich.console import Console

    from parablock.config import Config

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Task(Generic[Found]):
    """A call in a process of its own. name: for people. function: by its module's name; what it takes is pickled."""

    name: str
    function: Callable[..., Found]
    arguments: tuple[Any, ...]


def run(
    tasks: Mapping[Key, Task[Found]], jobs: int, console: Console, told: Callable[[Found], str] = lambda _found: "done"
) -> dict[Key, Found]:
    """What each has returned, once all have. What one raises is raised, and ends the others.

    jobs: how many at a time. told: of what one has returned, what is printed with its name as it ends.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["bench.simulation"])
    found: dict[Key, Found] = {}
    with ProcessPoolExecutor(jobs, mp_context=forks) as pool:
        try:
            began = time.monotonic()
            asked = {pool.submit(task.function, *task.arguments): key for key, task in tasks.items()}
            for done in as_completed(asked):
                key = asked[done]
                found[key] = done.result()
                left_s = (time.monotonic() - began) / len(found) * (len(asked) - len(found))
                console.print(
                    f"{len(found)} of {len(asked)}: {tasks[key].name}: {told(found[key])}; {left_s / 60:.0f} min left"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # each is minutes from its end, and nobody wants it now
                child.terminate()
            raise
    return found


def pretrained(settings: Config, folder: Path, console: Console) -> str:
    """The model that a run of its own has trained, to begin others with. folder: where it is put, which is new."""
    console.print("the model to fine-tune is trained first")
    run({folder: Task("pretrained", simulation.pretrain, (settings, folder))}, 1, console)
    return str(folder)


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Of all such benchmarks. rounds: of each run, unless asked otherwise."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help=f"of each run (default: {rounds})")
    add("--seeds", default="0-2", help="seeds of the runs, as 0,1,2 or 0-19 (default: 0-2)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run; repeatable")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of one thread (default: 1)")


def check_jobs(jobs: int) -> None:
    """Raises ValueError where that many cannot be run at a time."""
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
