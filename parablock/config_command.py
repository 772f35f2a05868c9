"""`parablock config`: show the settings of a file as they resolve, or explain every key."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parablock import config as settings

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="parablock config", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="TOML file; without one, the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key; may be repeated")
    parser.add_argument("--explain", action="store_true", help="every key with its default, unit and meaning")
    arguments = parser.parse_args(argv)
    if arguments.explain:
        Console(width=None if sys.stdout.isatty() else 160).print(_explained())
        return 0
    try:
        print(settings.to_toml(settings.load(arguments.config, arguments.set)), end="")
    except settings.ConfigError as error:
        print(f"parablock config: {error}", file=sys.stderr)
        return 2
    return 0


def _explained() -> Table:
    table = Table(show_lines=False, pad_edge=False)
    for heading in ("key", "default", "unit", "expects", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "key")
    for key in settings.keys():  # noqa: SIM118 - a function of ours, not a dict's
        default = str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
        meaning = key.meaning + (" (stays on its machine)" if key.local else "")
        cells = (key.path, default, key.unit, key.kind, meaning)
        table.add_row(*map(Text, cells))  # not markup: a meaning may hold [brackets]
    return table


if __name__ == "__main__":
    sys.exit(main())
