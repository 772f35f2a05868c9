"""The held-out scores of one or several files of rows, by task and over all: as a tree for JSON, and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from parablock.scores import total

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from parablock.scores import Scores

_COLUMNS = {
    "rows": ("rows", "{}"),
    "tokens": ("tokens", "{}"),
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "answered": ("answered", "{}"),
    "exact_match": ("exact\nmatch", "{:.1%}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
}


@dataclass(frozen=True)
class Scorecard:
    """files: the scores by task of each file, by its name. by_task: whether tasks are told apart."""

    files: Mapping[str, Mapping[str, Scores]]
    by_task: bool

    def tree(self) -> dict[str, Any]:
        """The scores over all, under `tasks` each task's, and where there are several files, under `files` each one's
        in the same form. `rows` are those of the loss. What is not known, or infinite, is None, as JSON has no other
        word for it."""
        tree = self._branch(self._over_all())
        if len(self.files) > 1:
            tree["files"] = {name: self._branch(tasks) for name, tasks in self.files.items()}
        return tree

    def table(self, title: str) -> Table:
        """A line for each file, each followed by its tasks, and for all files together."""
        table = Table(
            title=Text(title), title_justify="left", caption_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False,
        )  # fmt: skip
        table.add_column("", overflow="fold")
        for heading, _ in _COLUMNS.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for label, scores, last in self._lines():
            numbers = _numbers(scores)
            cells = (
                "–" if numbers[name] is None else form.format(numbers[name]) for name, (_, form) in _COLUMNS.items()
            )
            table.add_row(Text(label), *cells, end_section=last)
        whole = total(self._over_all().values())
        if not whole.answered:
            table.caption = "nothing was answered: of the first eval.generate rows, those that ask something are"
        elif whole.answered > whole.rows:
            table.caption = "rows: those of the loss, which are fewer than the answered ones (eval.rows, eval.generate)"
        return table

    def _lines(self) -> Iterator[tuple[str, Scores, bool]]:
        """Label, scores, and whether it is the last of its file."""
        parts = [*self.files.items(), ("all", self._over_all())] if len(self.files) > 1 else [("all", self._over_all())]
        for name, tasks in parts:
            shown = sorted(tasks.items()) if self.by_task else []
            yield _printable(name), total(tasks.values()), not shown
            for place, (task, scores) in enumerate(shown, start=1):
                yield f"  {_printable(task)}", scores, place == len(shown)

    def _branch(self, tasks: Mapping[str, Scores]) -> dict[str, Any]:
        branch = _numbers(total(tasks.values()))
        if self.by_task:
            branch["tasks"] = {task: _numbers(scores) for task, scores in sorted(tasks.items())}
        return branch

    def _over_all(self) -> dict[str, Scores]:
        """By task, over all files."""
        names = {task for tasks in self.files.values() for task in tasks}
        return {name: total(tasks[name] for tasks in self.files.values() if name in tasks) for name in sorted(names)}


def _numbers(scores: Scores) -> dict[str, Any]:
    numbers = {
        "rows": scores.rows,
        "tokens": scores.tokens,
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "exact_match": scores.exact_match,
        "answered": scores.answered,
        "rouge_l": scores.rouge_l,
        "free_form": scores.free_form,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}


def _printable(name: str) -> str:
    """As it is, unless a terminal could take some of it for a command."""
    return name if name.isprintable() else repr(name)
