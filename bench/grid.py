"""Which rows a benchmark has: every size of a block with every number of clients, each measured so and so often.

The options of the command line that say so, their defaults and their bounds, for the benchmarks that are asked like
this. What is measured in a row is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.units import parse_numbers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

MAX_BLOCK_MB = 4096.0


@dataclass(frozen=True)
class Grid:
    """What was asked for. rounds: measured ones of a run. repeat: runs of each kind, of which medians are given."""

    block_mb: tuple[float, ...]
    clients: tuple[int, ...]
    rounds: int
    repeat: int

    def rows(self) -> Iterator[tuple[int, float]]:
        """(clients, MB of a block) of each row."""
        return ((clients, block_mb) for clients in self.clients for block_mb in self.block_mb)


@dataclass(frozen=True)
class Defaults:
    """Of each option, without and with --quick, which is one row."""

    block_mb: tuple[str, str]
    clients: tuple[str, str]
    rounds: tuple[int, int]
    repeat: tuple[int, int]

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """--quick is the benchmark's own: it knows what fits into 60 s."""
        add = parser.add_argument
        add("--block-mb", help=f"sizes of a block in MB (1e6 bytes), a row for each {_told(self.block_mb)}")
        add("--clients", help=f"numbers of clients, rows for each {_told(self.clients)}")
        add("--rounds", type=int, help=f"rounds that are measured in each run {_told(self.rounds)}")
        add("--repeat", type=int, help=f"runs of each kind, of which the medians are given {_told(self.repeat)}")

    def grid(self, options: argparse.Namespace) -> Grid:
        """What the options ask for. Raises ValueError, with what to do, for what cannot be run."""
        quick = options.quick
        grid = Grid(
            block_mb=parse_numbers(options.block_mb or self.block_mb[quick], float, "--block-mb"),
            clients=parse_numbers(options.clients or self.clients[quick], int, "--clients"),
            rounds=options.rounds if options.rounds is not None else self.rounds[quick],
            repeat=options.repeat if options.repeat is not None else self.repeat[quick],
        )
        for name in ("rounds", "repeat"):
            if (value := getattr(grid, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not all(1e-3 <= size <= MAX_BLOCK_MB for size in grid.block_mb):
            raise ValueError(f"--block-mb takes sizes from 0.001 to {MAX_BLOCK_MB:g} MB, got {options.block_mb}")
        if quick and (len(list(grid.rows())) > 1 or grid.repeat > 1):
            raise ValueError("--quick is one row within 60 s; leave it out for several sizes, clients or repetitions")
        return grid


def block_bytes(block_mb: float) -> int:
    """Bytes of a block of `block_mb` MB (1e6 bytes), down to whole float32 values."""
    return int(block_mb * 1e6) // 4 * 4


def _told(default: tuple[str, str] | tuple[int, int]) -> str:
    full, quick = default
    return f"(default: {full})" if full == quick else f"(default: {full}; quick: {quick})"
