"""`python -m tests`: everything that CI runs, in order, stopping at the first failure with its exit code."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SCRIPTS = Path(sysconfig.get_path("scripts"))

CHECKS: tuple[tuple[str, list[str]], ...] = (
    ("lint", [PYTHON, "-m", "ruff", "check"]),
    ("format", [PYTHON, "-m", "ruff", "format", "--check"]),
    ("types", [PYTHON, "-m", "mypy"]),
    ("imports between packages", [str(SCRIPTS / "lint-imports")]),
    (
        "tests, and at least 95 % of the core's branches",
        [
            PYTHON,
            "-m",
            "pytest",
            # A process a core; many tests start processes of their own, so that more of them would only wait.
            "--numprocesses=auto",
            "--maxprocesses=4",
            "--dist=loadfile",  # what a module sets up for all its tests is set up once
            "--cov=parablock",
            "--cov-branch",
            "--cov-report=term",
            "--cov-fail-under=95",
        ],
    ),
)


def main() -> int:
    for purpose, command in CHECKS:
        shown = " ".join([Path(command[0]).name, *command[1:]])
        print(f"== {purpose}: {shown}", flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code != 0:
            print(f"== failed ({purpose}): exit code {code}", file=sys.stderr, flush=True)
            # A command that a signal ended has a negative code, which is no exit status.
            return code if code > 0 else 128 - code
    print("== everything passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
