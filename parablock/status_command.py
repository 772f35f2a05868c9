"""`parablock status RUN`: how far a run is, who serves it, who takes part, and what its privacy has cost so far.

Reads what the run's folder holds, also while a broker is at work in it; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parablock.accountant import INSTALL, NoAccountantError
from parablock.folder_lock import holder
from parablock.journal import Journal
from parablock.ledger import Ledger
from parablock.run_folder import JOURNAL, RunFolder, how_to_go_on

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_INPUT, EXIT_LATER = 2, 75


@dataclass(frozen=True)
class Status:
    """committed: rounds, of `rounds`. served_by: the broker's process; None: none is there. clients: on the roster at
    the last commit. reason: what was said of that round. loss: of training in the newest round that tells one.

    eval_loss, exact_match: of the newest evaluation. epsilon: what the committed rounds have cost, of `budget`, by the
    journal: a round's row of metrics is written only when all clients have reported on it. All of them None where there
    is none, epsilon also where nothing that works it out is installed.
    """

    run: str
    mode: str
    model: str
    rounds: int
    committed: int
    served_by: str | None
    endpoint: str | None
    clients: tuple[str, ...]
    reason: str | None
    loss: float | None
    eval_loss: float | None
    exact_match: float | None
    epsilon: float | None
    budget: float | None

    @property
    def complete(self) -> bool:
        return self.committed == self.rounds


def read(folder: RunFolder) -> Status:
    """Raises RunFolderError, JournalError or ConfigError where something is damaged, OSError where the disk refuses."""
    config, served_by = folder.config(), holder(folder.path)
    rows = folder.read_metrics()
    with Journal.open(folder.path / JOURNAL, read_only=True) as journal:
        last, committed, run = journal.last, journal.next_round, journal.facts.run
        ledger = Ledger(config.privacy)
        for entry in journal.entries() if config.privacy.private else ():
            ledger.take(entry.round, entry.charged)
    return Status(
        run=run,
        mode=config.mode,
        model=config.model,
        rounds=config.rounds,
        committed=committed,
        served_by=served_by,
        endpoint=folder.endpoint() if served_by is not None else None,
        clients=last.clients if last is not None else (),
        reason=last.reason if last is not None else None,
        loss=_newest(rows, "loss"),
        eval_loss=_newest(rows, "eval_loss"),
        exact_match=_newest(rows, "exact_match"),
        epsilon=_epsilon(ledger),
        budget=config.privacy.budget if config.privacy.private else None,
    )


def lines(status: Status, folder: RunFolder) -> list[str]:
    """The same for people."""
    if status.served_by is not None:
        state = f"served by {status.served_by} at {status.endpoint}"
    elif status.complete:
        state = "complete"
    else:
        state = f"no broker is there; {how_to_go_on(folder.path)}"
    told = [
        f"{status.run}  {status.mode}  {status.model}",
        f"round      {status.committed} of {status.rounds}; {state}",
        f"clients    {', '.join(status.clients) or 'none yet'}",
    ]
    if status.reason is not None:
        told.append(f"last       {status.reason}")
    scores = {
        "training loss": status.loss,
        "held-out loss": status.eval_loss,
        "exact match": status.exact_match,
    }
    if known := [f"{name} {value:.4f}" for name, value in scores.items() if value is not None]:
        told.append(f"scores     {', '.join(known)}")
    if status.budget is not None:
        spent = f"{status.epsilon:.4g}" if status.epsilon is not None else f"unknown ({INSTALL})"
        told.append(f"privacy    epsilon {spent} of {status.budget:g}")
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 where the input is wrong or the folder damaged; 75 where the disk refuses."""
    parser = argparse.ArgumentParser(prog="parablock status", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines for people")
    arguments = parser.parse_args(argv)
    try:
        folder = RunFolder.open(arguments.run)
        status = read(folder)
    except ValueError as error:
        print(f"parablock status: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"parablock status: {error}; when the disk no longer refuses, try again", file=sys.stderr)
        return EXIT_LATER
    print(json.dumps(asdict(status)) if arguments.json else "\n".join(lines(status, folder)))
    return 0


def _epsilon(ledger: Ledger) -> float | None:
    try:
        return ledger.epsilon
    except NoAccountantError:  # which is said, and keeps nobody from seeing the rest
        return None


def _newest(rows: Sequence[dict[str, Any]], name: str) -> Any:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


if __name__ == "__main__":
    sys.exit(main())
