"""The rows that a benchmark is asked for: the defaults with and without --quick, and every row once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytest

from bench import grid
from bench.grid import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULTS = grid.Defaults(block_mb=("4,16", "1.5"), clients=("2,4,8", "2"), rounds=(8, 5), repeat=(3, 1))


def asked(*arguments: str) -> Grid:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    DEFAULTS.add_options(parser)
    return DEFAULTS.grid(parser.parse_args(arguments))


def test_what_is_not_asked_for_is_the_default() -> None:
    assert asked() == Grid((4.0, 16.0), (2, 4, 8), rounds=8, repeat=3)
    assert asked("--quick") == Grid((1.5,), (2,), rounds=5, repeat=1)
    assert asked("--quick", "--block-mb", "64", "--rounds", "2") == Grid((64.0,), (2,), rounds=2, repeat=1)


def test_each_size_comes_once_with_each_number_of_clients() -> None:
    rows = list(asked("--clients", "2,4").rows())
    assert rows == [(2, 4.0), (2, 16.0), (4, 4.0), (4, 16.0)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--block-mb", "big"], "--block-mb takes numbers above zero"),
        (["--block-mb", "0.0001"], "--block-mb takes sizes from 0.001"),
        (["--block-mb", "5000"], "to 4096 MB"),
        (["--clients", "0"], "--clients takes numbers above zero"),
        (["--clients", "1.5"], "--clients takes numbers above zero"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--quick", "--clients", "2,4"], "--quick is one row"),
        (["--quick", "--block-mb", "4,16"], "--quick is one row"),
        (["--quick", "--repeat", "2"], "--quick is one row"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: Sequence[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        asked(*arguments)


def test_the_help_says_what_quick_changes() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    grid.Defaults(("4", "4"), ("2,4", "2"), (8, 5), (1, 1)).add_options(parser)
    told = parser.format_help()
    assert "a row for each (default: 4)\n" in told
    assert "rows for each (default: 2,4; quick: 2)\n" in told


def test_a_size_in_mb_is_whole_float32_values() -> None:
    assert grid.block_bytes(4) == 4_000_000
    assert grid.block_bytes(0.0010019) == 1000
