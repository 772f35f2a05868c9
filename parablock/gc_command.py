"""`parablock gc RUN`: drop superseded versions of blocks in a run's folder, and what a killed broker left unfinished.

Never the newest intact version of a block, and nothing while a broker is at work in the folder: that drops them itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from parablock.belonging import Belonging
from parablock.block_file import numbers
from parablock.journal import Journal
from parablock.run_folder import JOURNAL, RunFolder, RunFolderError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_INPUT, EXIT_LATER = 2, 75


def droppable(folder: RunFolder, keep: int) -> list[Path]:
    """What `parablock gc` removes. keep: newest versions of each block that stay, at least one.

    Raises RunFolderError where no version of a block is intact, JournalError where the journal is not: then all stay.
    """
    with Journal.open(folder.path / JOURNAL, read_only=True) as journal:
        belonging = Belonging.to(journal, folder.manifest(), folder.config())
    paths: list[Path] = [*folder.blocks.partial(), *folder.path.glob(".*.partial")]
    for index, versions in folder.blocks.listed().items():
        intact, wrong = folder.blocks.newest_intact(index, versions[-1], belonging.check)
        if intact is None:
            raise RunFolderError(f"no version of block {index} is intact, so nothing is dropped: {'; '.join(wrong)}")
        superseded = folder.blocks.superseded(index, keep)
        paths += [path for path in superseded if numbers(path) != (index, intact.label.version)]
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 where the input is wrong, the folder in use or damaged; 75 where the disk refuses."""
    parser = argparse.ArgumentParser(prog="parablock gc", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--keep", type=int, metavar="N", help="versions of each block that stay (default: journal.keep)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    arguments = parser.parse_args(argv)
    if arguments.keep is not None and arguments.keep < 1:
        print(f"parablock gc: --keep is at least 1, got {arguments.keep}", file=sys.stderr)
        return EXIT_INPUT
    try:
        with RunFolder.open(arguments.run) as folder:
            folder.lock(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "parablock gc")
            paths = droppable(folder, arguments.keep or folder.config().journal.keep)
            freed = sum(path.stat().st_size for path in paths)
            for path in paths:
                print(path.relative_to(folder.path))
                if not arguments.dry_run:
                    path.unlink()
            said = "would go" if arguments.dry_run else "gone"
            print(f"{len(paths)} files {said}, {freed / 1e6:.1f} MB")
    except ValueError as error:
        print(f"parablock gc: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"parablock gc: {error}; when the disk no longer refuses, give the same command again", file=sys.stderr)
        return EXIT_LATER
    return 0


if __name__ == "__main__":
    sys.exit(main())
