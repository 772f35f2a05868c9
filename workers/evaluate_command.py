"""`parablock evaluate TARGET`: held-out scores of a run's model, or of any other, by file and by task.

Only the command: what is measured, and how, is `workers.evaluation`'s business, how it is shown `workers.scorecard`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from parablock import config as settings
from parablock import export, models
from parablock.blocks import PartitionError
from parablock.config import ConfigError
from parablock.run_folder import CONFIG, RunFolder, RunFolderError
from workers.answers import AnswerFile, AnswerFileError, identity
from workers.evaluation import asked, check_tasks, evaluate
from workers.rows import DataError, Rows, load_rows
from workers.scorecard import Scorecard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parablock.config import Config

_FOR_THE_USER = (
    ConfigError, models.ModelError, DataError, PartitionError, export.ExportError, RunFolderError, AnswerFileError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """`parablock evaluate TARGET`. Returns the exit code: 0, 2 where the user's input is wrong, 75 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="parablock evaluate",
        description="Held-out loss and perplexity; and of answers that the model generates, exact match and ROUGE-L.",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a run's folder, an exported or other model folder, or a hub name"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        default=[],
        help="held-out rows (default: data.eval of the settings); several, as one a client, are also told apart",
    )
    parser.add_argument("--config", metavar="FILE", help="settings of another place than the run's own")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting, as eval.generate=32"
    )
    parser.add_argument(
        "--answers",
        metavar="FILE",
        type=Path,
        help="keep each answer in this .jsonl file; started again with it, the command goes on where it stopped",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    models.quiet()
    try:
        scores = _evaluate(arguments.target, arguments.data, arguments.config, arguments.set, arguments.answers)
    except _FOR_THE_USER as error:
        print(f"parablock evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"; the same command goes on with what is in {arguments.answers}" if arguments.answers else ""
        print(f"parablock evaluate: interrupted{kept}", file=sys.stderr)
        return 75
    if arguments.json:
        print(json.dumps(scores.tree()))
    else:
        Console().print(scores.table(f"held-out scores of {arguments.target}"))
    return 0


def _evaluate(
    target: str, data: Sequence[str], config_file: str | None, overrides: list[str], answers: Path | None
) -> Scorecard:
    """Raises what `_FOR_THE_USER` lists."""
    folder = Path(target).expanduser()
    is_run = (folder / CONFIG).is_file()
    config = settings.load(config_file or (folder / CONFIG if is_run else None), overrides)
    sources = _named(data or [config.data.eval])
    if answers is not None and not config.eval.generate:
        raise ConfigError("--answers keeps generated answers, and eval.generate = 0 asks for none; raise it")
    if is_run:
        loaded = export.load_trained(RunFolder.open(folder))
    else:
        loaded = models.load(target, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed)
    limit = max(config.eval.rows, config.eval.generate) if config.eval.rows else 0
    load = partial(
        load_rows, settings=config.data, tokenizer=loaded.tokenizer, seed=config.seed, held_out=True, limit=limit,
        task=config.eval.task,
    )  # fmt: skip
    held_out = {name: load(source) for name, source in sources.items()}
    check_tasks(itertools.chain.from_iterable(held_out.values()), config.eval.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, rows in held_out.items():
        which = f" of {name}" if len(held_out) > 1 else ""
        print(f"held-out rows{which}: {rows.summary()}; device: {device}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        file = None if answers is None else stack.enter_context(_open(answers, loaded, held_out, config, device))
        return _scores(loaded, held_out, config, device, file)


def _named(sources: Sequence[str]) -> dict[str, str]:
    """The sources by the names of their files, or where two have the same name, by what they were called."""
    if not all(sources):
        raise DataError("there are no held-out rows to evaluate on; name them with --data FILE (or --data builtin)")
    firsts: dict[Path | str, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        same = path.resolve() if source != "builtin" and path.is_file() else source
        if same in firsts:
            told = f"{firsts[same]} and {source} are one" if firsts[same] != source else source
            raise DataError(f"--data names the same rows twice: {told}; name each of them once")
        firsts[same] = source
    names = [Path(source).name for source in sources]
    return dict(zip(names if len(set(names)) == len(names) else sources, sources, strict=True))


def _open(
    path: Path, loaded: models.Loaded, held_out: dict[str, Rows], config: Config, device: torch.device
) -> AnswerFile:
    questions = {name: asked(rows, config.eval, free_form=True) for name, rows in held_out.items()}
    file = AnswerFile(path, identity(loaded, questions, config.eval, device))
    if file.torn:
        print(f"{path}: its last line was cut off and is dropped ({file.torn} bytes)", file=sys.stderr)
    if len(file):
        print(f"{path}: goes on after {len(file)} of {sum(map(len, questions.values()))} answers", file=sys.stderr)
    return file


def _scores(
    loaded: models.Loaded, held_out: dict[str, Rows], config: Config, device: torch.device, file: AnswerFile | None
) -> Scorecard:
    model = loaded.model.to(device)
    console = Console(stderr=True)
    scores = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, rows in held_out.items():
            bar = progress.add_task("evaluating" if len(held_out) == 1 else escape(name))
            scores[name] = evaluate(
                model,
                loaded.tokenizer,
                rows,
                config.eval,
                device,
                partial(_show, progress, bar),
                free_form=True,
                known=None if file is None else file.known(name),
                keep=None if file is None else partial(file.append, name),
            )
    return Scorecard(scores, by_task=bool(config.eval.task))


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)
