"""EleutherAI's lm-evaluation-harness (lm_eval, an extra) over a model in memory, on task files of this machine.

Prompts, answers and metrics are the harness's, with its own seeds, so that the numbers compare with those that it
gives elsewhere. What is ours is what it may touch: templates run in jinja2's sandbox, code of task files only where
the user says so (`workers.task_files`), and no copy of the data stays behind in a cache.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import random
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from workers import task_files
from workers.sources import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from parablock.models import Loaded


class HarnessError(DataError):
    """The tasks cannot be evaluated. The message says why and what to do."""


@contextlib.contextmanager
def tasks(names: Sequence[str], folder: Path, *, trusted: bool) -> Iterator[Any]:
    """The tasks, groups or tags of the files in `folder` with these names, in which * and ? stand for any characters;
    as the harness holds them, with their data, which is gone afterwards.

    trusted: the task files may run code of their own. Raises HarnessError where lm_eval is not installed or a task
    cannot be loaded, TaskFileError for the files.
    """
    part = _import()
    part("api.metrics")  # registers them
    task_files.check(folder, part("api.registry").metric_registry, trusted=trusted)
    with _nothing_cached(), _templates(part("utils"), trusted=trusted), contextlib.redirect_stdout(sys.stderr):
        manager = part("tasks").TaskManager(include_path=str(folder), include_defaults=False)
        found = [name for pattern in names for name in _matching(manager, pattern, folder)]
        chosen = _load(manager, list(dict.fromkeys(found)))
        for task in chosen["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=part("defaults").DEFAULT_OTHER_SEED)
        yield chosen


def evaluate(loaded: Loaded, chosen: Any, *, batch_size: int, limit: int, trusted: bool) -> dict[str, Any]:
    """What `lm_eval.evaluator.evaluate` returns for the `tasks` that were chosen.

    loaded: the model on its device. limit: rows of each task at most; 0: all. trusted: what the model writes may be
    run as code, where a task does that. Raises HarnessError for a template that does not fit a row, a metric beyond
    all numbers, and a row on which the harness gives up.
    """
    part = _import()
    defaults = part("defaults")
    model = part("models.huggingface").HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    torch.manual_seed(defaults.DEFAULT_OTHER_SEED)
    try:
        results: dict[str, Any] = part("evaluator").evaluate(
            lm=model, task_dict=chosen, limit=limit or None, log_samples=False, confirm_run_unsafe_code=trusted
        )
    except TemplateError as error:
        raise HarnessError(
            f"a template of a task does not fit one of its rows: {error}; mend the one or the other"
        ) from error
    except OverflowError as error:  # as a perplexity of rows that the model finds all but impossible
        raise HarnessError(
            f"lm_eval cannot work out a metric of {', '.join(chosen['tasks'])} ({type(error).__name__}: {error}): the "
            "model finds right answers too unlikely for it; name another metric in the task file"
        ) from error
    except AssertionError as error:  # which it has instead of a message
        failed = traceback.extract_tb(error.__traceback__)[-1].line
        raise HarnessError(
            f"lm_eval gives up on a row of {', '.join(chosen['tasks'])} ({failed}); the model's context has "
            f"{model.max_length} tokens: where it is about length, shorten the rows, or leave them out by --limit"
        ) from error
    return results


def _import() -> Any:
    """The function that gives a module of the harness by its name."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise HarnessError(
            "--lm-eval needs lm_eval, which is not installed here: pip install -c constraints.txt -e '.[lm-eval]'"
        ) from error
    # Of a model that is loaded already it says that what it would have been loaded by has no effect.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    return lambda name: importlib.import_module(f"lm_eval.{name}")


def _matching(manager: Any, pattern: str, folder: Path) -> list[str]:
    names: list[str] = manager.match_tasks([pattern])
    if not names:
        there = ", ".join(manager.all_tasks) or "none"
        raise HarnessError(f"there is no task {pattern!r} in {folder}; there are {there}")
    return names


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except Exception as error:  # whatever the harness makes of a file of the user's
        first = str(error).strip().partition("\n")[0]
        raise HarnessError(
            f"lm_eval cannot load {', '.join(names)} ({type(error).__name__}: {first}); check the task file, and that "
            "its data is there: data_files are relative to the working directory"
        ) from error


@contextlib.contextmanager
def _templates(utils: Any, *, trusted: bool) -> Iterator[None]:
    """The templates of task files cannot reach beyond the row that they are filled with."""
    own = utils.env
    if not trusted:
        utils.env = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=True)
        utils.env.filters.update(own.filters)
    try:
        yield
    finally:
        utils.env = own


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    """`datasets` keeps a copy of every file that it reads: here in a folder that is deleted."""
    import datasets  # seconds to import

    place = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="parablock-lm-eval-") as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = place
