"""A command with an eye on its memory: `python -m bench.metered REPORT.json COMMAND ...`, instead of the command.

It runs as it would without this, as a child of this process; at its end the report has the largest resident memory of
its whole life, as the kernel tells it (getrusage: VmHWM of /proc), imports and loading included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.processes import die_with_parent


def prefix(report: Path) -> tuple[str, ...]:
    """What goes before a command to have it metered."""
    return (sys.executable, "-m", "bench.metered", str(report))


def read(report: Path) -> int:
    """The peak, in bytes."""
    peak: int = json.loads(report.read_text(encoding="utf-8"))["peak_bytes"]
    return peak


def main(argv: list[str]) -> int:
    """The command's exit code; 128 and its number where a signal ended it. No report unless it ended well."""
    report, *command = argv
    process = subprocess.Popen(command, preexec_fn=die_with_parent if sys.platform == "linux" else None)
    _, status, used = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        Path(report).write_text(json.dumps({"peak_bytes": used.ru_maxrss * 1024}), encoding="utf-8")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
