"""The report: one self-contained page about any run, whatever is missing in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from parablock import plots, report
from parablock.config import Config, from_dict
from parablock.manifest import Block, Manifest
from parablock.run_folder import RunFolder
from parablock.shards import ShardCounts
from parablock.trace import BROKER, Span, Trace, client_process

if TYPE_CHECKING:
    from pathlib import Path

VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """What a browser makes of a page: its text, its identifiers, what they are used for, and whether it is whole."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert value is not None
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), f"a link out of the page: {value}"
                self.uses.add(value[1:])
            assert name != "src", "something is loaded"
            self.uses |= set(re.findall(r"url\(#([^)]*)\)", value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def settings(**changes: Any) -> Config:
    return from_dict({"rounds": 20, "model": "org/tiny", **changes})


def round_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "round", "round": number, "block": number % 5, "block_name": f"layer {number % 5}",
        "time_s": 10.0 + 4 * number, "loss": 2.0 - 0.05 * number, "compute_s": 4.0, "comm_s": 2.0, "exposed_s": 0.5,
        "round_s": 4.5, "bytes_up": 3_000_000, "bytes_down": 5_000_000, "contributors": ["ann", "bob"], "late": 0,
        "staleness": 1.0, "drift": 0.5, "alpha": 0.6,
    }  # fmt: skip
    return row | changes


def evaluation(number: int, loss: float | None, exact_match: float | None = None) -> dict[str, Any]:
    return {
        "kind": "evaluation", "round": number, "time_s": 10.0 + 4 * number, "eval_loss": loss, "perplexity": None,
        "exact_match": exact_match, "rows": 64, "tokens": 999, "answered": 32 if exact_match is not None else 0,
    }  # fmt: skip


def example_spans(rounds: int, clients: int = 2) -> list[Span]:
    spans = [Span(BROKER, "broker", "fold", f"round {r}", 4.0 * r + 5, 4.0 * r + 5.5, {}) for r in range(rounds)]
    for client in range(clients):
        party = (client_process(client), f"client-{client}")
        spans.append(Span(*party, "compute", "evaluation", 0.0, 0.9, {}))
        for number in range(rounds):
            start_s = 1 + 4.0 * number
            spans.append(Span(*party, "compute", f"round {number} · layers 0-2", start_s, start_s + 3.5, {}))
            spans.append(Span(*party, "compute", "wait for round", start_s + 3.5, start_s + 4, {"round": number}))
            spans.append(Span(*party, "upload", "delta", start_s + 3.5, start_s + 5, {"round": number}))
            spans.append(Span(*party, "download", "block", start_s + 5, start_s + 6, {"round": number}))
    return spans


def make_run(path: Path, rows: list[dict[str, Any]], spans: list[Span], config: Config) -> RunFolder:
    folder = RunFolder.create(path, config)
    with folder, Trace(folder.trace_path) as trace:
        for row in rows:
            folder.append_metrics(row)
        for process, name in {span.process: span.process_name for span in spans}.items():
            trace.name_process(process, name)
        for span in spans:
            trace.span(span.process, span.lane, span.name, span.start_s, span.end_s, **span.args)
    return folder


def numbers(config: Config, rows: list[dict[str, Any]]) -> dict[str, str]:
    rounds = [row for row in rows if row["kind"] == "round"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    return {name: value for name, value, _ in report.headlines(config, rounds, evaluations)}


FINISHED = [
    evaluation(-1, 1.6304, 1 / 32),
    *(round_row(number) for number in range(20)),
    evaluation(19, 0.9662, 8 / 32),
]


def test_a_finished_runs_page_is_whole_and_says_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "gsm8k", FINISHED, example_spans(20), settings())
    folder.write_manifest(Manifest(tuple(Block(index, f"layer {index}", ()) for index in range(7)), ()))
    assert report.main([str(folder.path)]) == 0
    assert capsys.readouterr().out == f"report: {folder.path}/report/index.html\n"
    page = Page(folder.report_path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids)), "an identifier occurs twice"
    assert page.uses <= set(page.ids), "something refers to what is not there"
    for words in (
        "gsm8k", "Finished: 20 rounds in 1 min 26 s.", "parablock", "org/ tiny", "7, descending", "2: ann, bob",
        "1.630 → 0.966", "3.1 % → 25.0 %", "shrink, lands at boundary", "75.0 %", "client-1", "60 MB",
    ):  # fmt: skip
        assert words in page.text
    assert list(folder.report_path.parent.iterdir()) == [folder.report_path]


def test_the_same_run_gives_the_same_page() -> None:
    pages = {report.page("run", settings(), FINISHED, example_spans(4)) for _ in range(2)}
    assert len(pages) == 1


def test_nothing_in_the_page_can_be_fetched() -> None:
    text = report.page("run", settings(), FINISHED, example_spans(20))
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\"' <]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "<script" not in text
    assert "@import" not in text


def test_text_takes_the_pages_colour() -> None:
    text = report.page("run", settings(), FINISHED, example_spans(20))
    assert plots.INK not in text
    assert "currentColor" in text


def test_names_are_text_and_nothing_else() -> None:
    hostile = '<b>"&$x_1$病院'
    rows = [round_row(0, contributors=[hostile], block_name=hostile)]
    spans = [Span(1, hostile, "compute", f"round 0 · {hostile}", 0.0, 1.0, {})]
    page = Page(report.page(hostile, settings(model=hostile), rows, spans))
    assert page.text.count(hostile) == 5  # title, heading, model, clients, time line


@pytest.mark.parametrize(
    ("rows", "spans"),
    [
        pytest.param([], [], id="nothing yet"),
        pytest.param([evaluation(-1, 1.6)], [], id="only the first evaluation"),
        pytest.param([round_row(0)], example_spans(1), id="one round"),
        pytest.param([round_row(n) for n in range(3)], [], id="no evaluation and no trace"),
        pytest.param([{"kind": "round", "round": 0}, {"kind": "evaluation"}], [], id="rows without numbers"),
        pytest.param(
            [{key: value if key in ("kind", "round") else None for key, value in round_row(n).items()} for n in (0, 1)],
            example_spans(0),
            id="all numbers null",
        ),
        pytest.param([round_row(n, compute_s=None if n % 2 else 4.0) for n in range(6)], [], id="some numbers null"),
        pytest.param([round_row(0, round=None), {"kind": "of tomorrow"}], [], id="rows of another kind"),
        pytest.param([], [Span(BROKER, "broker", "fold", "start", 1.0, 1.0, {})], id="a moment without width"),
        pytest.param(FINISHED, example_spans(13, clients=9), id="many clients"),
        pytest.param([round_row(n) for n in range(1000)], example_spans(12, clients=1), id="many rounds"),
    ],
)
def test_a_page_comes_of_any_run(rows: list[dict[str, Any]], spans: list[Span]) -> None:
    text = report.page("run", settings(), rows, spans)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    assert len(text) < 1_000_000


def test_a_run_that_goes_on_says_how_far_it_is() -> None:
    text = Page(report.page("run", settings(), FINISHED[:4], [])).text
    assert "Not finished: 3 of 20 rounds in 18.0 s." in text
    assert "3 so far, descending" in text
    assert "No round of 20 is done yet." in report.page("run", settings(), [], [])
    some = Page(report.page("run", settings(round={"clients": 8, "fraction": 0.25}), [], [])).text
    assert "8 expected; 2 of 8 a round" in some
    hours = report.page("run", settings(rounds=1), [round_row(0, time_s=3723)], [])
    assert "Finished: 1 round in 1 h 02 min." in hours


@pytest.mark.parametrize(
    ("steps", "told"),
    [([], "8 of 4 rows"), ([8.0, 8.0], "8 of 4 rows"), ([8.0, None, 21.5], "8 to 21.5 (mean 14.8) of 4 rows")],
)
def test_steps_are_told_as_they_were_taken(steps: list[float | None], told: str) -> None:
    rows = [round_row(number, steps=taken) for number, taken in enumerate(steps)]
    assert told in Page(report.page("run", settings(), rows, [])).text


def test_times_are_means_without_the_warm_up() -> None:
    slow = {"round_s": 100.0, "compute_s": 50.0, "comm_s": 50.0, "exposed_s": 50.0}
    rows = [round_row(number, **(slow if number < 2 else {})) for number in range(10)]
    found = numbers(settings(), rows)
    assert (found["Round time"], found["Compute"], found["Communication"]) == ("4.5 s", "4 s", "2 s")
    assert found["Communication hidden"] == "75.0 %"
    assert numbers(settings(mode="fedbcd"), rows)["Round time"] == "15.1 s"  # without the first round only
    assert numbers(settings(), rows[:4])["Round time"] == "52.2 s"  # too short to leave anything out


def test_hidden_counts_only_rounds_with_both_times() -> None:
    rows = [round_row(0), round_row(1, comm_s=None), round_row(2, exposed_s=None)]
    assert numbers(settings(), rows)["Communication hidden"] == "75.0 %"
    assert numbers(settings(), [round_row(0, comm_s=0.0)])["Communication hidden"] == report.NONE


def test_numbers_that_were_not_recorded_are_not_made_up() -> None:
    found = numbers(settings(), [evaluation(-1, 1.6), round_row(0, bytes_up=None, late=2)])
    assert found["Held-out loss"] == "1.600"
    assert found["Held-out perplexity"] == found["Exact match"] == found["Sent up"] == report.NONE
    remarks = {name: remark for name, _, remark in report.headlines(settings(), [round_row(0, late=2)], [])}
    assert remarks["Rounds"] == "2 late contributions"
    rows = [round_row(0, late=2, folded_late=0), round_row(1, late=1, folded_late=1)]
    remarks = {name: remark for name, _, remark in report.headlines(settings(), rows, [])}
    assert remarks["Rounds"] == "3 late contributions, 1 of them counted in a later round"
    assert remarks["Held-out loss"] == "not evaluated"
    assert remarks["Exact match"] == "no answers generated"


def test_a_long_time_line_shows_its_two_ends() -> None:
    drawn = plots.timeline(example_spans(40))
    assert drawn is not None
    assert {"the first 5 rounds", "the last 5 of 40 rounds"} <= set(Page(drawn).texts)
    # One label per compute bar: the time axes have none of 7 pt.
    labels = set(re.findall(r'<text style="font-size: 7px[^>]*>(\d+)</text>', drawn))
    assert labels == {str(number) for number in (*range(5), *range(34, 40))}


def test_a_short_time_line_is_shown_whole() -> None:
    drawn = plots.timeline(example_spans(6))
    assert drawn is not None
    texts = Page(drawn).texts
    assert {"waiting", "client-0", "client-1", "broker", "upload", "download", "fold"} <= set(texts)
    assert "first" not in " ".join(texts)


def test_more_clients_than_fit_are_told() -> None:
    text = Page(report.page("run", settings(), [], example_spans(2, clients=9))).text
    assert "The first 6 of 9 clients are shown." in text
    assert "client-5" in text
    assert "client-6" not in text


def test_averaging_keeps_the_mean_and_leaves_out_what_is_missing() -> None:
    x = np.arange(1000.0)
    y = np.where(x % 3 == 0, np.nan, 7.0)
    y[500:520] = np.nan
    mean_x, mean_y = plots._averaged(x, y)
    assert len(mean_x) <= plots.MOST_POINTS
    assert mean_x[0] == np.mean(x[:5])
    assert set(mean_y[np.isfinite(mean_y)]) == {7.0}
    assert np.isnan(mean_y).sum() == 4


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, (1.0, "bytes")), (999, (1.0, "bytes")), (1000, (1e3, "kB")), (2.5e9, (1e9, "GB")), (1e13, (1e12, "TB"))],
)
def test_bytes_are_told_in_a_unit_that_fits(count: float, told: tuple[float, str]) -> None:
    assert plots.byte_unit(count) == told


def test_how_the_rows_were_divided_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = '<b>"&$x_1$病院'
    config = settings(partition={"method": "dirichlet", "field": hostile, "alpha": 0.3})
    folder = make_run(tmp_path / "run", FINISHED, [], config)
    assert report.main([str(folder.path)]) == 0
    assert "Rows by client" not in folder.report_path.read_text(encoding="utf-8")
    counts = ShardCounts("dirichlet", 0.3, hostile, 0, (3, 9), {hostile: (1, 7), "_": (2, 2)})
    (folder.path / "partition.json").write_text(json.dumps(counts.to_dict()), encoding="utf-8")
    assert report.main([str(folder.path)]) == 0
    page = Page(folder.report_path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert f"dirichlet by {hostile}, alpha 0.3, seed 0: 12 rows for 2 clients, from 3 to 9 each." in page.text
    assert [text.strip() for text in page.texts].count(hostile) == 1  # the label
    assert "_" in [text.strip() for text in page.texts]
    assert capsys.readouterr().err == ""
    (folder.path / "partition.json").write_text("{}", encoding="utf-8")
    assert report.main([str(folder.path)]) == 0
    assert "Rows by client" not in folder.report_path.read_text(encoding="utf-8")
    told = capsys.readouterr().err
    assert told.startswith("parablock report: the page is without the rows by client: ")
    assert "partition.json is damaged" in told


def test_a_division_of_an_earlier_attempt_is_not_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", FINISHED, [], settings())
    (folder.path / "partition.json").write_text("of another run", encoding="utf-8")
    assert report.main([str(folder.path)]) == 0


@pytest.mark.parametrize(("generate", "told"), [(0, "no answers generated"), (8, "answer ends in #### N")])
def test_why_nothing_was_answered_is_said(generate: int, told: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [evaluation(-1, 1.6)], [], settings(eval={"generate": generate}))
    assert report.main([str(folder.path)]) == 0
    assert told in folder.report_path.read_text(encoding="utf-8")


def test_rows_in_turn_are_shown_where_a_field_labels_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", FINISHED, [], settings(partition={"field": "task"}))
    counts = ShardCounts("iid", None, "task", 0, (6, 6), {"news": (6, 6)})
    (folder.path / "partition.json").write_text(json.dumps(counts.to_dict()), encoding="utf-8")
    assert report.main([str(folder.path)]) == 0
    assert "Rows by client" in folder.report_path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "is_shown"),
    [
        ({}, True),
        ({"method": "field", "alpha": None}, False),
        ({"field": "topic"}, False),
        ({"alpha": 0.5}, False),
        ({"seed": 1}, False),
    ],
)
def test_a_division_by_other_settings_is_not_shown(changes: dict[str, Any], is_shown: bool, tmp_path: Path) -> None:
    config = settings(partition={"method": "dirichlet", "field": "task", "alpha": 0.3})
    folder = make_run(tmp_path / "run", FINISHED, [], config)
    counts = ShardCounts("dirichlet", 0.3, "task", 0, (3, 9), {"news": (3, 9)}).to_dict() | changes
    (folder.path / "partition.json").write_text(json.dumps(counts), encoding="utf-8")
    assert report.main([str(folder.path)]) == 0
    assert ("Rows by client" in folder.report_path.read_text(encoding="utf-8")) == is_shown


def test_the_page_goes_where_out_says(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [round_row(0)], [], settings())
    folder.trace_path.unlink()
    assert report.main([str(folder.path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert "Not finished" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert not folder.report_path.exists()


def test_what_the_user_got_wrong_ends_with_2_and_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "parablock report: there is no run folder" in capsys.readouterr().err
    folder = make_run(tmp_path / "run", [], [], settings())
    (tmp_path / "file").write_text("")
    assert report.main([str(folder.path), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot write the page" in capsys.readouterr().err
    folder.trace_path.write_text("[\n{damaged,\n{}\n]\n")
    assert report.main([str(folder.path)]) == 2
    assert "trace.json, line 2 is not a trace event" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert ended.value.code == 2


def test_a_page_tells_of_restarts_and_of_rounds_without_reports() -> None:
    rows = [round_row(number) for number in range(6)]
    for missing in (2, 3):  # committed by a broker that was killed before it could tell more
        unknown = ("time_s", "compute_s", "comm_s", "exposed_s", "round_s", "staleness", "drift", "alpha")
        rows[missing] |= dict.fromkeys(unknown)
    shown = Page(report.page("run", settings(), rows, [], restarts=[19.5, 75.0]))
    assert "Broker restarts 2, at 19.5 s, 1 min 15 s" in shown.text
    assert "broker restarted" in shown.text
    assert "Broker restarts" not in Page(report.page("run", settings(), rows, [])).text


def test_what_privacy_has_cost_stands_among_the_numbers() -> None:
    privacy = {"where": "central", "clip": 0.5, "noise": 1.5, "budget": 8.0}
    rows = [round_row(number) | {"epsilon": 1.0 + number} for number in range(3)]
    ((_, value, remark),) = [
        line for line in report.headlines(from_dict({"privacy": privacy}), rows, []) if line[0] == "Privacy spent, ε"
    ]
    assert value == "3 of 8"
    assert remark.startswith("at delta 1e-05; central, cut to 0.5, noise multiplier 1.5")
    assert "Privacy spent, ε" not in numbers(settings(), rows)
