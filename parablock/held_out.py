"""The report's section on held-out loss by task and by client: a figure of the tasks, and a table of both."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.ticker import MaxNLocator

from parablock import plots
from parablock.shards import shown_label

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from parablock.plots import Row

MOST_LINES = 30  # of tasks in the table
_COLOURS = [matplotlib.colormaps["tab20"](place) for place in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1)]  # without grey
_NONE = "–"  # a number that the run has not recorded


def section(evaluations: Sequence[Row]) -> str:
    """HTML; empty where the rows of metrics.jsonl tell neither several clients nor a task."""
    told = [row for row in evaluations if isinstance(row.get("clients"), dict)]
    if not told:
        return ""
    first, last = told[0], told[-1]
    tasks, clients = _tasks(told), sorted(last["clients"])
    if not tasks and len(clients) < 2:
        return ""
    shown = clients[: plots.MOST_CLIENTS] if len(clients) > 1 else []
    lines = [_line("all", first, last, [last["clients"][client] for client in shown])]
    for name in tasks[:MOST_LINES]:
        parts = [_task(last["clients"][client], name) for client in shown]
        lines.append(_line(shown_label(name, 64), _task(first, name), _task(last, name), parts))
    heads = ["", "rows", "loss", "perplexity", *(f"loss of {client}" for client in shown)]
    cells = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    caption = "First and last evaluation, clients' only the last; all tokens of a task count alike, whoever has them."
    if tasks:
        caption += f" The figure shows the {min(len(tasks), len(_COLOURS))} tasks with most rows."
    rest = [f"{len(tasks) - MOST_LINES} more tasks"] if len(tasks) > MOST_LINES else []
    rest += [f"{len(clients) - len(shown)} more clients"] if shown and len(clients) > len(shown) else []
    if rest:
        caption += f" Not shown: {', '.join(rest)}."
    kind = "task" if not shown else "task and client" if tasks else "client"
    return (
        f"<h2>Held-out loss by {kind}</h2><figure>{_figure(told, tasks) if tasks else ''}"
        f"<table><tr>{cells}</tr>{''.join(lines)}</table><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _tasks(evaluations: Sequence[Row]) -> list[str]:
    """Those of the newest evaluation that tells any, the ones with most rows first."""
    tasks: Mapping[str, Row] = next((row["tasks"] for row in reversed(evaluations) if row.get("tasks")), {})
    return sorted(tasks, key=lambda name: (-(tasks[name].get("rows") or 0), name))


def _task(branch: Row, name: str) -> Row:
    """A task's numbers in an evaluation, or in one client's part of it."""
    found: Row = (branch.get("tasks") or {}).get(name) or {}
    return found


def _line(name: str, first: Row, last: Row, clients: Sequence[Row]) -> str:
    before, after = _number(first, "eval_loss", ".3f"), _number(last, "eval_loss", ".3f")
    cells = [
        _number(last, "rows", ","),
        after if first is last else f"{before} → {after}",
        _number(last, "perplexity", ".2f"),
        *(_number(part, "eval_loss", ".3f") for part in clients),
    ]
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row">{html.escape(name)}</th>{numbers}</tr>'


def _number(row: Row, key: str, form: str) -> str:
    return _NONE if row.get(key) is None else format(row[key], form)


def _figure(evaluations: Sequence[Row], tasks: Sequence[str]) -> str:
    """Held-out loss by task over the rounds; of many tasks the first."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        done = plots.column(evaluations, "round") + 1
        axes.plot(done, plots.column(evaluations, "eval_loss"), ":", color=plots.INK, lw=1.2, label="all")
        for name, colour in zip(tasks, _COLOURS, strict=False):
            losses = plots.column([_task(row, name) for row in evaluations], "eval_loss")
            # With a space before it: matplotlib leaves a name that starts with _ out of a legend.
            axes.plot(done, losses, color=colour, marker="o", ms=3, lw=1.1, label=f" {shown_label(name, 24)}")
        axes.set(xlabel="rounds done", ylabel="held-out loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right upper")

    return plots.svg("tasks", 2.9, "Held-out loss by task", draw)
