"""The report's figures: metrics rows and trace spans in, inline SVG out.

Every function returns one `<svg>` element, or None where the rows hold nothing to draw. The elements can
stand in one HTML page (no identifier occurs twice), take the page's text colour, so that they can be read on
light and dark, and name no address. Which numbers are worth a figure is the report's business.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from parablock.trace import BROKER, LANES, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Column = np.ndarray[Any, np.dtype[np.float64]]

INK = "#123456"  # stands for the page's text colour; every occurrence becomes currentColor
COMPUTE, UPLOAD, DOWNLOAD, EXPOSED, FOLD, NEUTRAL = (
    "#4c84c3",
    "#dd8a2e",
    "#2ea37c",
    "#d0525d",
    "#8d74c4",
    "#8c8c8c",
)
LANE_COLOURS = {"compute": COMPUTE, "upload": UPLOAD, "download": DOWNLOAD, "fold": FOLD}

WIDTH_IN = 9.6
MOST_POINTS = 240  # per series; more rounds than this are averaged in groups
EDGE_ROUNDS = 5  # a long time line shows so many rounds from each end
MOST_CLIENTS = 6  # rows of more clients would be unreadable

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.parse_math": False,  # a $ in a client's name is a $
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "hatch.linewidth": 0.8,
}


def column(rows: Sequence[Row], key: str) -> Column:
    """One number per row as float64 of shape (rows,); NaN where a row has none."""
    values = (row.get(key) for row in rows)
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values], dtype=np.float64)


def loss(rounds: Sequence[Row], evaluations: Sequence[Row], restarts: Sequence[float] = ()) -> str | None:
    """Training and held-out loss, by rounds done and by time. restarts: when the broker came back, in seconds."""
    training, held_out = column(rounds, "loss"), column(evaluations, "eval_loss")
    if not (np.isfinite(training).any() or np.isfinite(held_out).any()):
        return None

    def draw(figure: Figure) -> None:
        by_round, by_time = figure.subplots(1, 2, sharey=True)
        for axes, training_x, held_out_x in (
            # Round r's loss and the evaluation after it belong to r + 1 rounds done; -1 is before the first.
            (by_round, column(rounds, "round") + 1, column(evaluations, "round") + 1),
            (by_time, column(rounds, "time_s"), column(evaluations, "time_s")),
        ):
            if np.isfinite(training).any():
                dots = "o" if len(rounds) <= 60 else ""
                x, y = _averaged(training_x, training)
                axes.plot(x, y, color=COMPUTE, lw=1.1, marker=dots, ms=2.5, label="training, mean over clients")
            if np.isfinite(held_out).any():
                axes.plot(held_out_x, held_out, ":", color=UPLOAD, marker="o", ms=5, label="held out")
        for at in restarts:
            by_time.axvline(at, color=NEUTRAL, lw=0.8, ls="--", label="broker restarted" if at == restarts[0] else "")
        by_round.set(xlabel="rounds done", ylabel="loss (nats per token)")
        by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_time.set_xlabel("time since the start (s)")
        by_round.margins(x=0.02)
        by_round.set_xlim(left=-0.02 * len(rounds) - 0.1, auto=True)
        by_time.set_xlim(left=-0.02 * by_time.get_xlim()[1], auto=True)
        handles, labels = by_time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))

    return svg("loss", 3.1, "Loss by round and by time", draw)


def timeline(spans: Sequence[Span]) -> str | None:
    """What the broker and each client did when, a row per lane; of a long run its first and last rounds."""
    if not spans:
        return None
    clients = sorted({span.process for span in spans if span.process != BROKER})
    shown = {BROKER, *clients[:MOST_CLIENTS]}
    rows = sorted({(span.process, span.lane) for span in spans if span.process in shown}, key=_lane_order)
    names = {span.process: span.process_name for span in spans}
    windows = _windows(spans)
    places, titles = _places(rows)
    height = 0.8 + len(windows) * (0.55 + 0.17 * (max(places.values()) + 1))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(windows), 1, squeeze=False)[:, 0]
        for axes, (title, start_s, end_s) in zip(panels, windows, strict=True):
            for span in spans:
                if span.process in shown and span.end_s >= start_s and span.start_s <= end_s:
                    _draw_span(axes, span, places[span.process, span.lane], end_s - start_s)
            for process, place in titles.items():
                axes.text(
                    0.002, place, names[process], transform=axes.get_yaxis_transform(),
                    va="center", weight="bold", size=8,
                )  # fmt: skip
            margin = 0.005 * (end_s - start_s) or 0.5
            axes.set(xlim=(start_s - margin, end_s + margin), ylim=(max(places.values()) + 0.7, -0.8), title=title)
            axes.set_yticks([places[row] for row in rows], [lane for _, lane in rows])
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
        panels[-1].set_xlabel("time since the start (s)")
        keys = [Patch(color=LANE_COLOURS[lane], label=lane) for lane in LANES if any(lane == row[1] for row in rows)]
        if any(_waits(span) for span in spans):
            keys.append(Patch(fill=False, edgecolor=EXPOSED, hatch="////", label="waiting"))
        figure.legend(handles=keys, loc="outside upper right", ncols=len(keys))

    return svg("timeline", height, "Time line of compute and communication per client", draw)


def times(rounds: Sequence[Row]) -> str | None:
    """Per round: compute and exposed communication stacked, all communication as a line beside them."""
    compute, exposed, communication = (column(rounds, key) for key in ("compute_s", "exposed_s", "comm_s"))
    if not any(np.isfinite(values).any() for values in (compute, exposed, communication)):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        number = column(rounds, "round")
        x, compute_y = _averaged(number, compute)
        _, exposed_y = _averaged(number, exposed)
        _, communication_y = _averaged(number, communication)
        width = 0.8 * max(1.0, float(x[-1] - x[0]) / max(1, len(x) - 1))
        axes.bar(x, compute_y, width, color=COMPUTE, label="compute")
        # A missing compute time must not hide the exposed time that stands on it.
        axes.bar(x, exposed_y, width, bottom=np.nan_to_num(compute_y), color=EXPOSED, label="exposed: waiting")
        axes.plot(
            x,
            communication_y,
            color=INK,
            lw=1,
            marker="_" if len(x) > 60 else "o",
            ms=3.5,
            label="communication",
        )
        axes.margins(x=0.01)
        axes.set(xlabel="round", ylabel="time per round (s)", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        if len(x) == 1:  # not a bar as wide as the page
            axes.set_xlim(x[0] - 3, x[0] + 3)
        figure.legend(loc="outside upper right", ncols=3)

    return svg("times", 2.9, "Compute, exposed communication and all communication per round", draw)


def traffic(rounds: Sequence[Row]) -> str | None:
    """Bytes up and down, cumulated over the rounds."""
    up, down = column(rounds, "bytes_up"), column(rounds, "bytes_down")
    if not (np.isfinite(up).any() or np.isfinite(down).any()):
        return None
    totals = [np.cumsum(np.nan_to_num(values)) for values in (up, down)]
    scale, unit = byte_unit(max(float(total[-1]) for total in totals))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        number = column(rounds, "round") + 1
        # Both directions often carry the same: the wide line stays visible under the thin one.
        for label, total, colour, width in (
            ("up", totals[0], UPLOAD, 4.0),
            ("down", totals[1], DOWNLOAD, 1.6),
        ):
            x, y = _averaged(np.concatenate([[number[0] - 1], number]), np.concatenate([[0.0], total]) / scale)
            axes.plot(x, y, color=colour, lw=width, label=f"{label}: {total[-1] / scale:.3g} {unit}")
        axes.set(xlabel="rounds done", ylabel=f"traffic in total ({unit})", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper left")

    return svg("traffic", 2.6, "Bytes up and down, cumulated", draw)


def byte_unit(count: float) -> tuple[float, str]:
    """The decimal unit in which `count` bytes are best told: (bytes per unit, name)."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return scale, unit
    return 1.0, "bytes"


def _averaged(x: Column, y: Column) -> tuple[Column, Column]:
    """The points themselves, or the means of equal groups of them where there are more than MOST_POINTS."""
    if len(x) <= MOST_POINTS:
        return x, y
    group = -(-len(x) // MOST_POINTS)
    starts = np.arange(0, len(x), group)
    means = []
    for values in (x, y):
        present = np.isfinite(values)
        sums = np.add.reduceat(np.where(present, values, 0.0), starts)
        counts = np.add.reduceat(present.astype(np.float64), starts)
        means.append(np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0))
    return means[0], means[1]


def _lane_order(row: tuple[int, str]) -> tuple[int, int]:
    return row[0], LANES.get(row[1], len(LANES) + 1)


def _places(rows: Sequence[tuple[int, str]]) -> tuple[dict[tuple[int, str], float], dict[int, float]]:
    """Where each (process, lane) lies on the y axis, and where each process's name stands above them."""
    places: dict[tuple[int, str], float] = {}
    titles: dict[int, float] = {}
    place = 0.0
    for process, lane in rows:
        if process not in titles:
            place += 0.25 if titles else 0.0
            titles[process] = place
            place += 1.0
        places[process, lane] = place
        place += 1.0
    return places, titles


def _windows(spans: Sequence[Span]) -> list[tuple[str, float, float]]:
    """The stretches of time to show, as (title, start_s, end_s)."""
    start_s, end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    work = [(span, _round_of(span)) for span in spans if span.lane == "compute" and not _waits(span)]
    rounds = sorted({number for _, number in work if number is not None})
    if len(rounds) <= 2 * EDGE_ROUNDS + 2:
        return [("", start_s, end_s)]
    first, last = set(rounds[:EDGE_ROUNDS]), set(rounds[-EDGE_ROUNDS:])
    first_start_s = min(span.start_s for span, number in work if number in first)
    first_end_s = max(span.end_s for span, number in work if number in first)
    last_start_s = min(span.start_s for span, number in work if number in last)
    # The last rounds' blocks still have to travel, and what moves them belongs here; an evaluation does not.
    last_end_s = max(span.end_s for span in spans if _round_of(span) in last)
    return [
        (f"the first {EDGE_ROUNDS} rounds", first_start_s, first_end_s),
        (f"the last {EDGE_ROUNDS} of {len(rounds)} rounds", last_start_s, last_end_s),
    ]


def _draw_span(axes: Axes, span: Span, place: float, window_s: float) -> None:
    number = _round_of(span)
    width_s = span.end_s - span.start_s
    if _waits(span):
        axes.barh(place, width_s, 0.62, span.start_s, fill=False, edgecolor=EXPOSED, hatch="////", linewidth=0.6)
        return
    colour = LANE_COLOURS.get(span.lane, NEUTRAL) if number is not None else NEUTRAL
    # Neighbouring rounds differ in shade: one sees that an upload lies under the compute of another round.
    faint = number is not None and number % 2 == 1
    axes.barh(place, width_s, 0.76, span.start_s, color=colour, alpha=0.5 if faint else 1.0, linewidth=0)
    if number is not None and width_s > 0.018 * window_s:
        axes.text(
            span.start_s + width_s / 2, place, str(number),
            ha="center", va="center_baseline", size=7, color=INK if faint else "white", clip_on=True,
        )  # fmt: skip


def _waits(span: Span) -> bool:
    return span.lane == "compute" and span.name.startswith("wait")


def _round_of(span: Span) -> int | None:
    given = span.args.get("round")
    if isinstance(given, int):
        return given
    named = re.search(r"\bround (\d+)", span.name)
    return int(named[1]) if named else None


@contextmanager
def missing_glyphs_ignored() -> Iterator[None]:
    """Draw what matplotlib's font has no sign for as a box, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        yield


def svg(name: str, height_in: float, title: str, draw: Callable[[Figure], None]) -> str:
    """Draw on a new figure and return it as an `<svg>` element whose identifiers start with `name`."""
    # Text is drawn by the browser, which has the glyphs; matplotlib only measures it.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), missing_glyphs_ignored():
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        # No date: the same run gives the same page.
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    opening = re.search(r'viewBox="[^"]*"', text)
    assert opening is not None, "matplotlib wrote an svg without a viewBox"
    text = f'<svg {opening[0]} role="img" aria-label="{title}">{text[text.index(">") + 1 :]}'
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font: (bold|\d00) ([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", text)
    return text.replace(INK, "currentColor").strip()
