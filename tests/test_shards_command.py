"""`parablock shards`: the table, the plot and the numbers, and what it says of wrong input."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parablock import cli, shards_plot
from parablock.shards import ShardCounts
from tests.shown import shown
from workers.shards_command import main, table

DATA = Path("/work/shared/data")
TASKS = ("maths", "poems", "news")
DIRICHLET = ("--set", "partition.method=dirichlet", "--set", "partition.field=task", "--set", "partition.alpha=1.0")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"task": TASKS[n % 3], "text": f"a secret {n}"} for n in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counts(clients: int, labels: int, **changes: Any) -> ShardCounts:
    """Client c has c + 1 rows of each label."""
    held = tuple(range(1, clients + 1))
    by_label = {f"label {number}": held for number in range(labels)}
    by_client = tuple(max(labels, 1) * rows for rows in held)
    given = {"method": "field", "alpha": None, "field": "task", "seed": 0, "by_client": by_client, "by_label": by_label}
    return ShardCounts(**(given | changes))


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip() and "──" not in line]


def test_the_table_and_the_numbers_say_the_same(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "--workers", "3", "--set", f"data.train={source}", *DIRICHLET, "--json"]) == 0
    captured = capsys.readouterr()
    *lines, last = captured.out.splitlines()
    found: dict[str, Any] = json.loads(last)
    assert (found["method"], found["alpha"], found["field"], found["seed"]) == ("dirichlet", 1.0, "task", 0)
    assert {label: sum(held) for label, held in found["by_label"].items()} == dict.fromkeys(TASKS, 30)
    assert [sum(held) for held in zip(*found["by_label"].values(), strict=True)] == found["by_client"]
    assert lines[0].startswith("dirichlet by task, alpha 1, seed 0: 90 rows for 3 clients, from ")
    heading, *rows = cells("\n".join(lines[1:]))
    assert heading == ["client", "rows", "maths", "news", "poems"]
    for client, row in enumerate(rows[:-1]):
        by_label = [str(found["by_label"][label][client]) for label in ("maths", "news", "poems")]
        assert row == [str(client), str(found["by_client"][client]), *by_label]
    assert rows[-1] == ["all", "90", "30", "30", "30"]
    assert "secret" not in captured.out + captured.err


def test_a_label_may_be_shown_where_it_does_not_divide(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", f"data.train={source}", "--set", "partition.field=task"]) == 0
    assert cells(capsys.readouterr().out)[1:] == [
        ["client", "rows", "maths", "news", "poems"],
        ["0", "45", "15", "15", "15"],
        ["1", "45", "15", "15", "15"],
        ["all", "90", "30", "30", "30"],
    ]


def test_the_plot_and_its_numbers_lie_beside_each_other(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "shards.png"
    settings = tmp_path / "run.toml"
    settings.write_text(f'data.train = "{source}"\npartition = {{ method = "quantity", alpha = 5.0 }}\n')
    assert main([str(settings), "--workers", "4", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    kept = ShardCounts.from_dict(json.loads(out.with_suffix(".json").read_text(encoding="utf-8")))
    assert (kept.method, kept.rows, len(kept.by_client), kept.by_label) == ("quantity", 90, 4, {})


def test_more_labels_and_clients_than_fit_are_summed() -> None:
    rows = cells(shown(table(counts(30, 15))).replace("label ", "label"))
    assert rows[0] == ["client", "rows", *(f"label{number}" for number in range(9)), "others"]
    assert rows[1] == ["0", "15", *["1"] * 9, "6"]
    assert rows[19] == ["18", "285", *["19"] * 9, "114"]
    rest = sum(range(20, 31))
    assert rows[20] == ["11", "others", f"{15 * rest:,}", *[str(rest)] * 9, f"{6 * rest:,}"]
    assert rows[21] == ["all", f"{15 * 465:,}", *["465"] * 9, f"{6 * 465:,}"]
    assert len(rows) == 22


def test_what_just_fits_is_shown_whole() -> None:
    text = shown(table(counts(20, 10)))
    assert "others" not in text
    assert len(cells(text)) == 22
    assert cells(shown(table(counts(1, 0)))) == [["client", "rows"], ["0", "1"]]


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = "[red]x[/] $y_1$ 病院"
    given = counts(2, 0, by_label={hostile: (1, 1), "_hidden\n": (0, 1)}, by_client=(1, 2), field="_f")
    assert hostile in shown(table(given))
    shards_plot.png(given, tmp_path / "shards.png")


@pytest.mark.parametrize(("clients", "labels"), [(1, 0), (2, 3), (5, 12), (5, 13), (200, 40)])
def test_a_plot_comes_of_any_division(clients: int, labels: int) -> None:
    text = shards_plot.svg(counts(clients, labels))
    assert len(text) < 500_000
    assert ("others" in text) == (labels > 12)
    assert ("client (the first 40 of 200)" in text) == (clients == 200)
    assert ("label 11" in text) == (labels == 12)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workers", "0"], "--workers is at least 1, got 0"),
        (["--workers", "200000"], "round.clients must be"),
        (["--out", "shards.svg"], "--out names a plot, as shards.png, got shards.svg"),
        (["--set", "partition.alpha=0"], "partition.alpha must be a number above 0"),
        (["--set", "partition.method=dirichlet"], "partition.field names none"),
        (["--set", "partition.method=even"], "one of iid, dirichlet, field, quantity"),
        ([*DIRICHLET], "row 1 has no field 'task', which partition.field names; it has completion, prompt; name one"),
        (["--set", "data.train=no-such.jsonl"], "there is no data file no-such.jsonl"),
        (["--out", "/dev/null/shards.png"], "cannot write /dev/null/shards.png"),
        (["no-such.toml"], "cannot read the config file no-such.toml"),
    ],
)
def test_wrong_input_is_told(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("parablock shards: ")
    assert complaint in captured.err


def test_more_workers_than_rows_or_values(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--set", f"data.train={source}", "--set", "partition.field=task")
    assert main([*data, "--workers", "91"]) == 2
    assert "it has 90 rows for 91 clients" in capsys.readouterr().err
    assert main([*data, "--workers", "4", "--set", "partition.method=field"]) == 2
    assert "the field 'task' has 3 values for 4 clients" in capsys.readouterr().err
    assert main([*data, *DIRICHLET, "--workers", "9", "--set", "partition.alpha=1e-9"]) == 2
    assert "would have no rows (rows by client, from 0: " in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not on this machine")
def test_the_instruction_data_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / "instructions_train.jsonl"
    tasks = Counter(json.loads(line)["task"] for line in path.read_text(encoding="utf-8").splitlines())
    settings = [f"--set=data.train={path}", "--set=partition.method=field", "--set=partition.field=task"]
    assert main([*settings, "--workers", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["by_client"] == sorted(tasks.values(), reverse=True)
