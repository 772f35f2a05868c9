"""`parablock quickstart`: the main job on the built-in default, from nothing to a trained model and a report.

Two workers and a broker as real processes train a tiny Llama from scratch on arithmetic word problems; nothing is
downloaded. Ends with a small table of what was learnt and how much of the communication was hidden.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parablock import config as settings
from parablock.launch import Launch
from parablock.metrics import hidden_share
from parablock.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKERS = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="parablock quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/quickstart- and the present time)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key; may be repeated")
    arguments = parser.parse_args(argv)
    out = arguments.out or Path("runs") / f"quickstart-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    here = ["network.bind=tcp://127.0.0.1:*", f"round.clients={WORKERS}"]
    with resources.as_file(resources.files("parablock") / "quickstart.toml") as path:
        try:
            config = settings.load(path, [*here, *arguments.set])
        except settings.ConfigError as error:
            print(f"parablock quickstart: {error}", file=sys.stderr)
            return 2
    print("parablock quickstart: starting a broker and two workers; this takes about a minute and a half", flush=True)
    code = Launch(config, out, WORKERS).run()
    if code != 0:
        return code
    from parablock import report  # matplotlib takes a second to import

    code = report.main([str(out)])
    if code == 0:
        Console(highlight=False).print(summary(RunFolder.open(out)))
    return code


def summary(folder: RunFolder) -> Table:
    """What a finished run achieved, from its metrics."""
    rows = folder.read_metrics()
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    rounds = [row for row in rows if row["kind"] == "round"]
    table = Table(title=Text(str(folder.path)), show_header=True, title_justify="left")  # a path is no markup
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        table.add_row("held-out loss", _number(first["eval_loss"], "{:.3f}"), _number(last["eval_loss"], "{:.3f}"))
        match = "{:.1%}"
        table.add_row("exact match", _number(first["exact_match"], match), _number(last["exact_match"], match))
    if rounds:
        told = [row["round_s"] for row in rounds if row["round_s"] is not None]
        seconds = told[1:] or told  # the first one warms up
        mean = _number(sum(seconds) / len(seconds) if seconds else None, "{:.2f} s")
        table.add_row("mean round time", "", f"{mean} over {len(rounds)} rounds")
        table.add_row("communication hidden", "", _number(hidden_share(rounds), "{:.0%}"))
    table.add_row("report", "", Text(str(folder.report_path)))
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
