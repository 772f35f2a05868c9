"""The report's section on tasks and clients: a line for each task, a column for each client, within bounds."""

from __future__ import annotations

from typing import Any

from parablock import report
from tests.test_report import FINISHED, Page, evaluation, settings


def scores(loss: float | None, rows: int = 8, **tasks: float) -> dict[str, Any]:
    numbers = {"eval_loss": loss, "perplexity": None if loss is None else 10 * loss, "exact_match": None, "rows": rows}
    return numbers | ({"tasks": {task: scores(part, rows) for task, part in tasks.items()}} if tasks else {})


def test_tasks_and_clients_have_a_line_and_a_column_each() -> None:
    hostile = "<b>\0 qa"
    first = evaluation(-1, 3.0) | {
        "clients": {"ann": scores(3.5, qa=3.5), "bob": scores(2.5, **{hostile: 2.5})},
        "tasks": {"qa": scores(3.5, 4), hostile: scores(2.5, 9)},
    }
    last = evaluation(19, 1.0) | {
        "clients": {"ann": scores(1.25, qa=1.25), "bob": scores(0.75, **{hostile: 0.75})},
        "tasks": {"qa": scores(1.25, 4), hostile: scores(0.75, 9)},
    }
    page = Page(report.page("run", settings(), [first, *FINISHED[1:-1], last], []))
    assert "Held-out loss by task and client" in page.text
    assert "loss of ann loss of bob all 64 3.000 → 1.000 – 1.250 0.750" in page.text
    qa, other = page.text.index("qa 4 3.500 → 1.250 12.50 1.250 –"), page.text.index("<b>� qa 9 2.500 → 0.750")
    assert other < qa, "most rows first"
    assert len(page.ids) == len(set(page.ids))


def test_of_many_tasks_and_clients_some_are_shown_and_the_rest_is_counted() -> None:
    names = {f"task {place}": 1.0 for place in range(40)}
    row = evaluation(-1, 1.0) | {"clients": {f"c{place}": scores(1.0, **names) for place in range(9)}}
    page = Page(report.page("run", settings(), [row | {"tasks": scores(1.0, **names)["tasks"]}], []))
    assert "The figure shows the 10 tasks with most rows. Not shown: 10 more tasks, 3 more clients." in page.text


def test_one_client_without_tasks_has_no_table() -> None:
    row = evaluation(-1, 1.0) | {"clients": {"ann": scores(1.0)}}
    assert "Held-out loss by" not in report.page("run", settings(), [row], [])


def test_clients_without_tasks_have_one_line() -> None:
    row = evaluation(-1, 1.0) | {"clients": {"ann": scores(1.5), "bob": scores(None)}}
    page = Page(report.page("run", settings(), [row], []))
    assert "Held-out loss by client rows loss perplexity loss of ann loss of bob all 64 1.000 – 1.500 –" in page.text
