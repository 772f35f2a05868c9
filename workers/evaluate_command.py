"""`parablock evaluate TARGET`: held-out scores of a run's model, or of any other, by file and by task.

Only the command: what is measured, and how, is `workers.evaluation`'s business, how it is shown `workers.scorecard`'s;
`workers.harness` has another tool measure instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
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
from workers.harness_scorecard import HarnessScorecard
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
    parser.add_argument(
        "--lm-eval",
        metavar="TASK[,TASK]",
        default="",
        help="instead: these tasks, groups or tags (* and ? for any characters) of lm-evaluation-harness",
    )
    parser.add_argument("--tasks-dir", metavar="DIR", type=Path, help="the folder with the tasks' .yaml files")
    parser.add_argument(
        "--limit", metavar="N", type=_count, default=0, help="the first N rows of each of the harness's tasks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    models.quiet()
    scores: Scorecard | HarnessScorecard
    try:
        _check(arguments)
        scores = _with_harness(arguments) if arguments.lm_eval else _evaluate(arguments)
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


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that do not go together."""
    if not arguments.lm_eval and (arguments.tasks_dir is not None or arguments.limit):
        raise ConfigError("--tasks-dir and --limit belong to --lm-eval; name its tasks, or leave them out")
    if arguments.lm_eval and arguments.tasks_dir is None:
        raise ConfigError("--lm-eval wants --tasks-dir DIR, the folder with the tasks' .yaml files")
    if arguments.lm_eval and (arguments.data or arguments.answers is not None):
        raise ConfigError("--lm-eval takes the data that its tasks name; leave --data and --answers out")


def _with_harness(arguments: argparse.Namespace) -> HarnessScorecard:
    """Raises what `_FOR_THE_USER` lists."""
    from workers import harness  # what it needs comes with an extra

    names = [name.strip() for name in arguments.lm_eval.split(",")]
    # Not the run's own settings: who trusted the code of its model has not spoken of these files.
    trusted = settings.load(arguments.config, arguments.set).trust_remote_code
    config, is_run = _settings(arguments)
    with harness.tasks(names, arguments.tasks_dir.expanduser(), trusted=trusted) as tasks:
        loaded = _load(arguments.target, config, is_run)
        loaded.model.to(_device()).eval()
        results = harness.evaluate(
            loaded, tasks, batch_size=config.eval.batch_size, limit=arguments.limit, trusted=trusted
        )
    return HarnessScorecard(results)


def _load(target: str, config: Config, is_run: bool) -> models.Loaded:
    """A run's model with its blocks, or another by its folder or name."""
    if is_run:
        return export.load_trained(RunFolder.open(Path(target).expanduser()))
    return models.load(target, dtype=config.dtype, trust_remote_code=config.trust_remote_code, seed=config.seed)


def _settings(arguments: argparse.Namespace) -> tuple[Config, bool]:
    """The settings, and whether the target is a run's folder, which has its own."""
    own = Path(arguments.target).expanduser() / CONFIG
    is_run = own.is_file()
    return settings.load(arguments.config or (own if is_run else None), arguments.set), is_run


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _evaluate(arguments: argparse.Namespace) -> Scorecard:
    """Raises what `_FOR_THE_USER` lists."""
    answers: Path | None = arguments.answers
    config, is_run = _settings(arguments)
    sources = _named(arguments.data or [config.data.eval])
    if answers is not None and not config.eval.generate:
        raise ConfigError("--answers keeps generated answers, and eval.generate = 0 asks for none; raise it")
    loaded = _load(arguments.target, config, is_run)
    limit = max(config.eval.rows, config.eval.generate) if config.eval.rows else 0
    load = partial(
        load_rows, settings=config.data, tokenizer=loaded.tokenizer, seed=config.seed, held_out=True, limit=limit,
        task=config.eval.task,
    )  # fmt: skip
    held_out = {name: load(source) for name, source in sources.items()}
    check_tasks(itertools.chain.from_iterable(held_out.values()), config.eval.task)
    device = _device()
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


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"a whole number of rows from 1, as 100; got {text!r}")
    return int(text)


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)
