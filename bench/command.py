"""What the commands of the benchmarks share: their common options, exit codes, temporary folder, and SIGTERM.

Exit codes: 0; 1 where a run failed (the message has the ends of the logs); 2 for wrong input; 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bench import results
from bench.figures import FiguresError
from bench.netns import LinkError
from bench.processes import ChildError
from parablock.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

SHM = Path("/dev/shm")

Plan = TypeVar("Plan")


def parser(name: str, doc: str | None, quick: str) -> argparse.ArgumentParser:
    """With the options that all have. doc: the benchmark's, of which the first line is told. quick: what --quick is."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(doc or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help=f"{quick}: within 60 s")
    out = "keep the result here, and a plot beside it as FILE.png"
    made.add_argument("--out", type=Path, metavar="FILE.json", help=out)
    return made


def add_shm(parser: argparse.ArgumentParser) -> None:
    told = "keep the runs in /dev/shm, so that no disk is part of a round"
    parser.add_argument("--shm", action="store_true", help=told)


def seeds(text: str) -> tuple[int, ...]:
    """The seeds of --seeds, as in "0,1,2" or "0-19". Raises ValueError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds takes numbers and ranges, as 0,1,2 or 0-19; got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"--seeds names a seed twice, which would count as two; got {text!r}")
    return tuple(found)


def run(
    name: str,
    options: argparse.Namespace,
    plan: Callable[[argparse.Namespace, Path | None], Plan],
    measure: Callable[[Plan, Path], None],
) -> int:
    """Make the plan, then measure in a new temporary folder that goes at the end. Returns the exit code.

    options: with `out`, and with `shm` where the command has it. plan: of the options and where runs go (see `shm`);
    raises ValueError, with what to do, for what cannot be run. measure: prints and keeps its result itself; a
    ConfigError of its is wrong input too, as settings may fit neither each other nor the run.
    """
    try:
        results.check_out(options.out)
        where = shm(getattr(options, "shm", False))
        asked = plan(options, where)
    except ValueError as error:
        print(f"bench.{name}: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children and links end
    try:
        with tempfile.TemporaryDirectory(prefix=f"parablock-{name}-", dir=where) as folder:
            measure(asked, Path(folder))
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        print(f"bench.{name}: {error}", file=sys.stderr)
        return 2
    except (ChildError, LinkError, FiguresError, OSError) as error:
        print(f"bench.{name} failed: {error}", file=sys.stderr)
        return 1
    return 0


def shm(asked: bool) -> Path | None:
    """Where runs go: the file system in memory where it was asked for, else (None) the usual temporary folder.

    Raises ValueError where there is none.
    """
    if not asked:
        return None
    if not SHM.is_dir():
        raise ValueError(f"there is no {SHM} here; leave --shm out, and the runs go to {tempfile.gettempdir()}")
    return SHM
