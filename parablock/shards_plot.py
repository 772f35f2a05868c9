"""The figure of a division: rows by client, stacked by label; as an SVG for the report, or as a PNG by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from parablock import plots

if TYPE_CHECKING:
    from pathlib import Path

    from parablock.shards import ShardCounts

MOST_CLIENTS = 40
MOST_LABELS = 12

_HEIGHT_IN = 3.2
_INK = "#1d2733"  # on the white of a PNG
_COLOURS = [matplotlib.colormaps["tab20"](place) for place in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5)]  # without grey


def svg(counts: ShardCounts) -> str:
    """An `<svg>` element that can stand in the report's page."""
    return plots.svg("shards", _HEIGHT_IN, "Rows by client and label", lambda figure: _draw(figure, counts))


def png(counts: ShardCounts, path: Path) -> None:
    """Raises OSError where it cannot be written."""
    style = {key: _INK if value == plots.INK else value for key, value in plots.STYLE.items()}
    with matplotlib.rc_context(style), plots.missing_glyphs_ignored():
        figure = Figure(figsize=(plots.WIDTH_IN, _HEIGHT_IN), layout="constrained")
        _draw(figure, counts)
        figure.axes[0].set_title(counts.summary())
        figure.savefig(path, format="png", dpi=120, facecolor="white")


def _draw(figure: Figure, counts: ShardCounts) -> None:
    axes = figure.subplots()
    clients = range(min(len(counts.by_client), MOST_CLIENTS))
    columns = counts.columns(MOST_LABELS)
    bottom = [0] * len(clients)
    keys = []
    for place, (name, held) in enumerate(columns or [("", counts.by_client)]):
        folded = place == MOST_LABELS - 1 and len(counts.by_label) > MOST_LABELS
        colour = plots.NEUTRAL if folded else _COLOURS[place] if columns else plots.COMPUTE
        axes.bar(clients, held[: len(clients)], 0.8, bottom=bottom, color=colour)
        bottom = [below + rows for below, rows in zip(bottom, held, strict=False)]
        # With a space before it: matplotlib leaves a name that starts with _ out of a legend.
        keys.append(Patch(color=colour, label=f" {name}"))
    every = len(counts.by_client)
    shown = "client" if len(clients) == every else f"client (the first {len(clients)} of {every})"
    axes.set(xlabel=shown, ylabel="rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.grid(visible=False, axis="x")
    if len(clients) == 1:  # not a bar as wide as the page
        axes.set_xlim(-3, 3)
    if columns:
        figure.legend(handles=keys[::-1], loc="outside right upper")  # from the top, as the bars are
