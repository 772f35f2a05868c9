"""`parablock verify RUN`: whether a run's folder is intact, as a table of what was looked at and what is wrong."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from parablock import config as settings
from parablock.folder_lock import holder
from parablock.rebuild import needed, rebuild
from parablock.run_folder import RunFolder
from parablock.verification import Check, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_DAMAGED, EXIT_INPUT, EXIT_LATER = 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 intact; 1 something is damaged; 2 wrong input; 75 the disk refuses."""
    parser = argparse.ArgumentParser(prog="parablock verify", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="where the journal is damaged or lost, make it anew from its intact rows and the block files first",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    try:
        with RunFolder.open(arguments.run) as folder:
            if arguments.rebuild:
                with folder:  # locked until the journal is made, and no longer
                    _rebuild(folder)
            checks = verify(folder)
            _show(folder, checks, as_json=arguments.json)
    except ValueError as error:
        print(f"parablock verify: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(
            f"parablock verify: {error}; when the disk no longer refuses, give the same command again "
            "(no damage is known)",
            file=sys.stderr,
        )
        return EXIT_LATER
    return EXIT_DAMAGED if any(check.problems for check in checks) else 0


def _rebuild(folder: RunFolder) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    folder.lock(now, "parablock verify --rebuild")
    if not needed(folder):
        print("parablock verify: the journal is intact; it stays as it is", file=sys.stderr)
        return
    config = json.dumps(settings.to_dict(folder.config()))
    # Seconds since 1970: more brokers than that have not served the run.
    made = rebuild(folder, config, now, epoch=int(time.time()))
    kept = f" The old one is {made.kept_as}." if made.kept_as else ""
    print(
        f"parablock verify: made the journal anew, with {made.rows} rows; {made.lost} rounds that nothing tells of any "
        f"more are without one.{kept} The run goes on with round {made.next_round}",
        file=sys.stderr,
    )


def _show(folder: RunFolder, checks: list[Check], *, as_json: bool) -> None:
    owner = holder(folder.path)
    problems = [problem for check in checks for problem in check.problems]
    if as_json:
        tree = {
            "run": str(folder.path),
            "intact": not problems,
            "in_use_by": owner,
            "checks": list(map(asdict, checks)),
        }
        print(json.dumps(tree))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("checked", "found", ""):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check.what, check.found, f"{len(check.problems)} damaged" if check.problems else "intact")
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    if owner is not None:
        console.print(f"in use by {owner}: what it writes meanwhile may not have been looked at", soft_wrap=True)
    for problem in problems:
        console.print(f"\n{problem.file}: {problem.text}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
