"""A worker that writes down what it hears: `python -m bench.listening_worker LINES`, then as `python -m workers`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import workers.__main__
from bench.listener import ListeningLink


def main(argv: list[str]) -> int:
    """The worker's exit code."""
    lines, *arguments = argv
    workers.__main__.Link = partial(ListeningLink, Path(lines))  # type: ignore[assignment,misc]
    return workers.__main__.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
