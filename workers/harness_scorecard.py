"""The numbers of lm-evaluation-harness, by task and metric: as a tree for JSON, and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Metric:
    """A number of a task. filter: what was made of answers before, "none" where nothing. value, stderr: None where
    there is none, or it is not finite. higher_is_better: None where nobody says."""

    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessScorecard:
    """results: as `workers.harness.evaluate` returns them."""

    results: Mapping[str, Any]

    def tree(self) -> dict[str, Any]:
        """Under `tasks` each task's version, rows, examples before each (`shots`) and metrics, under `groups` the same
        of each group, whose rows are its tasks'."""
        tree = {"tasks": {name: self._branch(name, found) for name, found in self.results["results"].items()}}
        if groups := self.results.get("groups"):
            tree["groups"] = {name: self._branch(name, found) for name, found in groups.items()}
        return tree

    def table(self, title: str) -> Table:
        """A line for each metric of each group and task."""
        table = Table(
            title=Text(title), title_justify="left", caption_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False,
        )  # fmt: skip
        table.add_column("", overflow="fold")
        for heading in ("rows", "shots"):
            table.add_column(heading, justify="right")
        for heading in ("metric", "filter"):
            table.add_column(heading, overflow="fold")
        for heading in ("value", "±"):
            table.add_column(heading, justify="right", no_wrap=True)
        tree = self.tree()
        for name, branch in (*tree.get("groups", {}).items(), *tree["tasks"].items()):
            about = [Text(_printable(name)), _shown(branch["rows"]), _shown(branch["shots"])]
            for place, metric in enumerate(branch["metrics"]):
                cells = about if place == 0 else ["", "", ""]
                numbers = _significant(metric["value"]), _significant(metric["stderr"])
                table.add_row(*cells, Text(metric["metric"]), Text(metric["filter"]), *numbers)
        table.caption = "±: the standard error of the value"
        return table

    def _branch(self, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "version": self.results.get("versions", {}).get(name),
            "rows": self.results.get("n-samples", {}).get(name, {}).get("effective"),
            "shots": self.results.get("n-shot", {}).get(name),
            "metrics": [asdict(metric) for metric in self._metrics(name, found)],
        }

    def _metrics(self, name: str, found: Mapping[str, Any]) -> Iterator[Metric]:
        better = self.results.get("higher_is_better", {}).get(name, {})
        for key, value in found.items():
            metric, comma, filter = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = found.get(f"{metric}_stderr,{filter}")
                yield Metric(metric, filter, _number(value), _number(stderr), better.get(metric))


def _number(value: Any) -> float | None:
    """As JSON has it; the harness writes "N/A" where there is no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _significant(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.5g}"


def _shown(count: Any) -> str:
    return "–" if count is None else str(count)


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)
