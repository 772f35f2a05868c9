"""The report: one HTML page about a run, from its folder, that opens without a network.

It says what the settings were, what came out in numbers, and shows the figures of `parablock.plots`. It holds
numbers and names only, of the data no text but the labels by which rows were divided or are scored, and works at any
moment of a run.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parablock import held_out, plots, shards_plot
from parablock.metrics import hidden_share
from parablock.plots import Row, column
from parablock.run_folder import RunFolder, RunFolderError
from parablock.trace import Span, read_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parablock.config import Config
    from parablock.shards import ShardCounts

NONE = "–"  # a number that the run has not recorded

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2733; --soft: #5d6975; --page: #fff; --line: #dfe4ea; --panel: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dde3ea; --soft: #97a3b0; --page: #14181d; --line: #2c343d; --panel: #1a2027; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem;
  background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0; } .soft, figcaption { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: .75rem; }
dl div { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--panel); }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; text-align: left; } th[scope=row] { width: 13rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; overflow-x: auto; } figcaption { font-size: .9rem; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
"""


def page(
    name: str,
    config: Config,
    rows: Sequence[Row],
    spans: Sequence[Span],
    num_blocks: int | None = None,
    counts: ShardCounts | None = None,
    restarts: Sequence[float] = (),
) -> str:
    """The whole page. rows: of metrics.jsonl. num_blocks: of the model, None where it is not known yet. counts: None
    where the rows were not divided. restarts: when the broker came back, in seconds since the run began."""
    rounds = [row for row in rows if row.get("kind") == "round" and isinstance(row.get("round"), int)]
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    figures = (
        ("Loss", plots.loss(rounds, evaluations, restarts),
         "Training loss is the clients' own, over the steps of each round; held-out loss is on rows that "
         "nobody trains on."),
        ("Time line", plots.timeline(spans),
         "Numbers are rounds, and neighbouring rounds differ in shade: communication is hidden where an "
         "upload or a download lies under the compute of a later round. Grey is work outside any round."
         + _left_out(spans)),
        ("Time per round", plots.times(rounds),
         "Communication is hidden where its line has no red bar: only exposed time lengthens a round."),
        ("Traffic", plots.traffic(rounds), "All clients together, as sent over the links."),
    )  # fmt: skip
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="soft">{html.escape(_status(config, rounds, evaluations))}</p>',
        _cards(_settings(config, rounds, num_blocks) + _restarts(restarts)),
        "<h2>In numbers</h2>",
        _table(headlines(config, rounds, evaluations)),
    ]
    for title, figure, caption in figures:
        body.append(f"<h2>{title}</h2>")
        if figure is None:
            body.append('<p class="soft">Nothing recorded yet.</p>')
        else:
            body.append(f"<figure>{figure}<figcaption>{html.escape(caption)}</figcaption></figure>")
    body.append(held_out.section(evaluations))
    if counts is not None:
        caption = f"<figcaption>{html.escape(counts.summary())}.</figcaption>"
        body.append(f"<h2>Rows by client</h2><figure>{shards_plot.svg(counts)}{caption}</figure>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The page cannot fetch anything, whatever a name in it contains.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(name)} · parablock</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def headlines(config: Config, rounds: Sequence[Row], evaluations: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The run in numbers, as (what, value, remark). Times are means over the rounds after the warm-up."""
    steady = rounds[warmup_rounds(config, len(rounds)) :]
    remark = f"mean over {_rounds(len(steady))}"
    if len(steady) < len(rounds):
        remark += f", without the first {len(rounds) - len(steady)}"
    return [
        ("Held-out loss", _change(evaluations, "eval_loss", "{:.3f}"), _rows_used(evaluations)),
        ("Held-out perplexity", _change(evaluations, "perplexity", "{:.2f}"), ""),
        ("Exact match", _change(evaluations, "exact_match", "{:.1f} %", 100), _answers_used(config, evaluations)),
        ("Training loss", _change(rounds, "loss", "{:.3f}"), "first and last round"),
        ("Rounds", f"{len(rounds)} of {config.rounds}", _late(rounds)),
        *_privacy(config, rounds),
        ("Round time", _mean(steady, "round_s"), remark),
        ("Compute", _mean(steady, "compute_s"), "the slowest client's, per round"),
        (
            "Communication",
            _mean(steady, "comm_s"),
            "from the last delta ready to the block landed, per round",
        ),
        (
            "Exposed communication",
            _mean(steady, "exposed_s"),
            "what a client waited for the network, per round",
        ),
        ("Communication hidden", _hidden(steady), "1 - exposed / communication"),
        ("Sent up", _bytes(column(rounds, "bytes_up")), "by all clients together"),
        ("Sent down", _bytes(column(rounds, "bytes_down")), "to all clients together"),
    ]


def warmup_rounds(config: Config, num_rounds: int) -> int:
    """How many first rounds fill the pipeline and warm the caches, and are left out of mean times.

    None where the run is too short for the rest to say more than the whole.
    """
    filling = config.in_flight + 1
    return filling if num_rounds >= 2 * filling + 1 else 0


def main(argv: Sequence[str] | None = None) -> int:
    """`parablock report RUN [--out FILE.html]`. Returns the exit code: 0, or 2 where the input is wrong."""
    parser = argparse.ArgumentParser(prog="parablock report", description="One HTML page about a run, from its folder.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="default: RUN/report/index.html")
    arguments = parser.parse_args(argv)
    try:
        print(f"report: {write(RunFolder.open(arguments.run), arguments.out)}")
    except ValueError as error:
        print(f"parablock report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"parablock report: cannot write the page: {error}; choose another --out", file=sys.stderr)
        return 2
    return 0


def write(folder: RunFolder, out: Path | None = None) -> Path:
    """Write the page of a run and return its path (default: report/index.html in the folder).

    Raises RunFolderError, ConfigError or TraceError where the folder cannot be read, OSError where the page
    cannot be written. A division that cannot be read is told on stderr and left out.
    """
    out = out if out is not None else folder.report_path
    spans = read_trace(folder.trace_path) if folder.trace_path.exists() else []
    num_blocks = len(folder.manifest().blocks) if folder.has_manifest else None
    config = folder.config()
    restarts = [float(event["time_s"]) for event in folder.read_events() if event.get("kind") == "restarted"]
    name, counts = folder.path.resolve().name, _counts(folder, config)
    text = page(name, config, folder.read_metrics(), spans, num_blocks, counts, restarts)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside and renamed: whoever reloads the page of a running run sees a whole one.
    temporary = out.with_name(f".{out.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _counts(folder: RunFolder, config: Config) -> ShardCounts | None:
    """How the run's rows were divided; None where nobody kept it, or only what an earlier attempt at a run did."""
    if not config.partition.shown:
        return None
    try:
        counts = folder.shard_counts()
    except RunFolderError as error:
        print(f"parablock report: the page is without the rows by client: {error}", file=sys.stderr)
        return None
    return counts if counts is not None and counts.came_of(config.partition, config.seed) else None


def _status(config: Config, rounds: Sequence[Row], evaluations: Sequence[Row]) -> str:
    elapsed = column([*rounds, *evaluations], "time_s")
    elapsed = elapsed[np.isfinite(elapsed)]
    spent = f" in {_duration(float(elapsed.max()))}" if len(elapsed) else ""
    if not rounds:
        return f"No round of {config.rounds} is done yet."
    if len(rounds) < config.rounds:
        return f"Not finished: {len(rounds)} of {_rounds(config.rounds)}{spent}."
    return f"Finished: {_rounds(len(rounds))}{spent}."


def _settings(config: Config, rounds: Sequence[Row], num_blocks: int | None) -> list[tuple[str, str]]:
    clients = sorted({str(name) for row in rounds for name in row.get("contributors") or ()})
    known = str(num_blocks) if num_blocks else f"{len({row.get('block') for row in rounds})} so far"
    solver, pipeline = config.solver, config.pipeline
    learning_rate = f"{solver.lr:g}" + ("" if solver.lr_schedule == "constant" else f", {solver.lr_schedule}")
    sampled = config.sampled(config.round.clients)
    drawn = f"; {sampled} of {config.round.clients} a round" if sampled < config.round.clients else ""
    shown = [
        ("Mode", config.mode),
        ("Model", config.model),
        ("Blocks", f"{known}, {'drawn' if config.mode == 'lisa' else config.schedule.order}"),
        ("Steps per round, K", f"{_steps(solver.steps, rounds)} of {solver.batch_size * solver.accumulate} rows"),
        ("Learning rate", learning_rate),
        ("Clients", (f"{len(clients)}: {_listed(clients)}" if clients else f"{config.round.clients} expected") + drawn),
        ("Optimizer", solver.optimizer + (", state kept" if solver.state == "keep" else "")),
        ("Server optimizer", config.server.optimizer),
    ]
    if config.mode == "parablock":
        shown.append(("Correction", f"{pipeline.correction}, lands at {pipeline.land}"))
    return shown


def _restarts(at: Sequence[float]) -> list[tuple[str, str]]:
    return [("Broker restarts", f"{len(at)}, at {_listed([_duration(seconds) for seconds in at])}")] if at else []


def _steps(fixed: int, rounds: Sequence[Row]) -> str:
    """K; where it varied, the least and the most of the rounds' means over clients, and their mean."""
    taken = column(rounds, "steps")
    taken = taken[np.isfinite(taken)]
    if not len(taken):
        return str(fixed)
    if taken.min() == taken.max():
        return _significant(float(taken[0]))
    least, most, mean = (_significant(float(value)) for value in (taken.min(), taken.max(), taken.mean()))
    return f"{least} to {most} (mean {mean})"


def _listed(names: Sequence[str], most: int = 6) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _left_out(spans: Sequence[Span]) -> str:
    clients = len({span.process for span in spans if span.process})
    return f" The first {plots.MOST_CLIENTS} of {clients} clients are shown." if clients > plots.MOST_CLIENTS else ""


def _cards(pairs: Sequence[tuple[str, str]]) -> str:
    items = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value).replace('/', '/<wbr>')}</dd></div>"
        for name, value in pairs
    )
    return f"<dl>{''.join(items)}</dl>"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = (
        f'<tr><th scope="row">{html.escape(name)}</th><td class="number">{html.escape(value)}</td>'
        f'<td class="soft">{html.escape(remark)}</td></tr>'
        for name, value, remark in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _change(rows: Sequence[Row], key: str, form: str, scale: float = 1.0) -> str:
    values = scale * column(rows, key)
    values = values[np.isfinite(values)]
    if not len(values):
        return NONE
    first, last = form.format(values[0]), form.format(values[-1])
    return f"{first} → {last}" if len(values) > 1 else first


def _privacy(config: Config, rounds: Sequence[Row]) -> list[tuple[str, str, str]]:
    privacy = config.privacy
    if not privacy.private:
        return []
    spent = column(rounds, "epsilon")
    spent = spent[np.isfinite(spent)]
    value = f"{spent[-1]:.4g} of {privacy.budget:g}" if len(spent) else NONE
    remark = f"at delta {privacy.delta:g}; {privacy.where}, cut to {privacy.clip:g}, noise multiplier {privacy.noise:g}"
    return [("Privacy spent, ε", value, f"{remark}; of the client that gave to most rounds")]


def _late(rounds: Sequence[Row]) -> str:
    late, folded = (int(np.nansum(column(rounds, key))) for key in ("late", "folded_late"))
    counted = f", {folded} of them counted in a later round" if folded else ""
    return f"{late} late contributions{counted}" if late else ""


def _mean(rows: Sequence[Row], key: str) -> str:
    values = column(rows, key)
    values = values[np.isfinite(values)]
    return f"{_significant(float(values.mean()))} s" if len(values) else NONE


def _hidden(rows: Sequence[Row]) -> str:
    share = hidden_share(rows)
    return NONE if share is None else f"{100 * share:.1f} %"


def _bytes(values: plots.Column) -> str:
    if not np.isfinite(values).any():
        return NONE
    total = float(np.nansum(values))
    scale, unit = plots.byte_unit(total)
    return f"{_significant(total / scale)} {unit}"


def _rows_used(evaluations: Sequence[Row]) -> str:
    used = column(evaluations, "rows")
    used = used[np.isfinite(used)]
    return f"{int(used[-1])} rows, first and last evaluation" if len(used) else "not evaluated"


def _answers_used(config: Config, evaluations: Sequence[Row]) -> str:
    answered = column(evaluations, "answered")
    answered = answered[np.isfinite(answered)]
    if len(answered) and answered[-1]:
        return f"of {int(answered[-1])} generated answers"
    if len(answered) and config.eval.generate:
        return "no held-out row's answer ends in #### N; parablock evaluate grades any"
    return "no answers generated"


def _significant(value: float) -> str:
    """Three digits that matter, without an exponent in the range of seconds and megabytes."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
