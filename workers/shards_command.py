"""`parablock shards CONFIG.toml --workers N`: which worker of `parablock run` would get which rows, without a run.

Only the command: `workers.division` reads and divides the rows, `parablock.shards_plot` draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parablock import config as settings
from parablock.config import ConfigError
from parablock.shards import ShardCounts
from workers.division import divide_source
from workers.sources import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parablock.config import Config

EXIT_DONE, EXIT_INPUT = 0, 2

_MOST_LABELS = 10
_MOST_CLIENTS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where the input is wrong."""
    arguments = _parser().parse_args(argv)
    out: Path | None = arguments.out
    try:
        if arguments.workers < 1:
            raise ConfigError(f"--workers is at least 1, got {arguments.workers}")
        if out is not None and out.suffix.lower() != ".png":
            raise ConfigError(f"--out names a plot, as shards.png, got {out}")
        config = settings.load(arguments.config, [f"round.clients={arguments.workers}", *arguments.set])
        counts = counted(config, arguments.workers)
        if out is not None:
            write(counts, out)
    except (ConfigError, DataError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"cannot write {out}: {error.strerror or error}; choose another --out")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(Text(counts.summary()), soft_wrap=True)
    console.print(table(counts))
    if arguments.json:
        print(json.dumps(counts.to_dict()), flush=True)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parablock shards",
        description="Which worker of `parablock run` gets how many rows of which label, after the settings under "
        "[partition]. Reads the training rows and starts nothing.",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.toml", nargs="?", type=Path, help="the run's settings (default: the built-in ones)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting, as partition.alpha=0.1")
    add("--workers", type=int, default=2, metavar="N", help="workers that the run would have")
    add("--out", metavar="FILE.png", type=Path, help="also draw it, and write the numbers to FILE.json beside it")
    add("--json", action="store_true", help="also print one JSON object, the last line")
    return parser


def counted(config: Config, workers: int) -> ShardCounts:
    """What the division of the training rows comes to. Raises DataError."""
    division = divide_source(
        config.data.train, config.partition, split=config.data.split, seed=config.seed, clients=workers
    )
    return ShardCounts.of(config.partition, division.owners, division.labels, workers, config.seed)


def write(counts: ShardCounts, out: Path) -> None:
    """The plot and, beside it, the numbers. Raises OSError."""
    from parablock import shards_plot  # matplotlib takes a second to import

    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(counts.to_dict(), indent=1) + "\n", encoding="utf-8")
    shards_plot.png(counts, out)


def table(counts: ShardCounts) -> Table:
    """A line a client; of many labels and clients the last column and line are the rest's sums."""
    columns = [("rows", counts.by_client), *counts.columns(_MOST_LABELS)]
    made = Table(box=box.SIMPLE, padding=(0, 0), show_footer=len(counts.by_client) > 1)
    made.add_column("client", footer="all", no_wrap=True)
    for name, held in columns:
        made.add_column(Text(name), f"{sum(held):,}", justify="right", overflow="fold")
    clients = len(counts.by_client)
    shown = clients if clients <= _MOST_CLIENTS else _MOST_CLIENTS - 1
    for client in range(shown):
        made.add_row(str(client), *(f"{held[client]:,}" for _, held in columns))
    if shown < clients:
        made.add_row(f"{clients - shown} others", *(f"{sum(held[shown:]):,}" for _, held in columns))
    return made


def _complain(message: str) -> int:
    print(f"parablock shards: {message}", file=sys.stderr)
    return EXIT_INPUT


if __name__ == "__main__":
    sys.exit(main())
