"""`parablock evaluate TARGET`: held-out loss, perplexity and exact match of a run's model, or of any other.

Only the command: what is measured, and how, is `workers.evaluation`'s business.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from parablock import config as settings
from parablock import export, models
from parablock.blocks import PartitionError
from parablock.config import ConfigError
from parablock.run_folder import CONFIG, RunFolder, RunFolderError
from workers.evaluation import evaluate
from workers.rows import DataError, load_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

_FOR_THE_USER = (
    ConfigError, models.ModelError, DataError, PartitionError, export.ExportError, RunFolderError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """`parablock evaluate TARGET`. Returns the exit code: 0, or 2 where the user's input is wrong."""
    parser = argparse.ArgumentParser(
        prog="parablock evaluate",
        description="Held-out loss, perplexity, and exact match by generation for answers that end in `#### N`.",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a run's folder, an exported or other model folder, or a hub name"
    )
    parser.add_argument("--data", metavar="FILE", help="held-out rows (default: data.eval of the settings)")
    parser.add_argument("--config", metavar="FILE", help="settings of another place than the run's own")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting, as eval.generate=32"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    models.quiet()
    try:
        scores = _evaluate(arguments.target, arguments.data, arguments.config, arguments.set)
    except _FOR_THE_USER as error:
        print(f"parablock evaluate: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        # JSON has no infinity, which a perplexity can be.
        finite = {name: None if value is None or not math.isfinite(value) else value for name, value in scores.items()}
        print(json.dumps(finite))
    else:
        Console().print(_table(arguments.target, scores))
    return 0


def _evaluate(target: str, data: str | None, config_file: str | None, overrides: list[str]) -> dict[str, Any]:
    """The scores by name. Raises what `_FOR_THE_USER` lists."""
    folder = Path(target).expanduser()
    is_run = (folder / CONFIG).is_file()
    config = settings.load(config_file or (folder / CONFIG if is_run else None), overrides)
    source = data or config.data.eval
    if not source:
        raise DataError("there are no held-out rows to evaluate on; name them with --data FILE (or --data builtin)")
    if is_run:
        loaded = export.load_trained(RunFolder.open(folder))
    else:
        loaded = models.load(target, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed)
    limit = max(config.eval.rows, config.eval.generate) if config.eval.rows else 0
    rows = load_rows(source, config.data, tokenizer=loaded.tokenizer, seed=config.seed, held_out=True, limit=limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"held-out rows: {rows.summary()}; device: {device}", file=sys.stderr)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("evaluating")
        scores = evaluate(
            loaded.model.to(device),
            loaded.tokenizer,
            rows,
            config.eval,
            device,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    return {
        "rows": len(rows),
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "exact_match": scores.exact_match,
        "answered": scores.answered,
    }


def _table(target: str, scores: dict[str, Any]) -> Table:
    table = Table(title=Text(f"held-out scores of {target}"), show_header=False)
    for name, value in scores.items():
        shown = (
            "not asked (eval.generate)" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value}"
        )
        table.add_row(name.replace("_", " "), shown)
    return table
