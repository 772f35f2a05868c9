"""Gaps by group and series, with their intervals, and the bar that they are held against: one plot for the benchmarks
that compare final losses of many runs.

What a gap is, and what it is compared with, is told by the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def plot(
    gaps: Sequence[tuple[str, str, Mapping[str, Any]]], what: str, bar_pct: float, *, linear_to: float | None = None
) -> Figure:
    """A line of points for each group, a colour for each series.

    gaps: group, series, and the gap as `Paired.told` gives it. what: the axis' label. bar_pct: the dashed line.
    linear_to: beyond so many per cent, to either side, the scale is logarithmic; None: nowhere.
    """
    groups, series = (list(dict.fromkeys(each[place] for each in gaps)) for place in (0, 1))
    figure = Figure(figsize=(8, 1.5 + max(0.3, 0.12 * len(series)) * len(groups)), layout="constrained")
    axes = figure.subplots()
    for group, name, gap in gaps:
        number = series.index(name)
        place = groups.index(group) + 0.6 * (number + 0.5) / len(series) - 0.3
        if gap["low_pct"] is not None:
            axes.plot([gap["low_pct"], gap["high_pct"]], [place, place], color=f"C{number}", linewidth=1)
        axes.plot([gap["gap_pct"]], [place], color=f"C{number}", marker="o", markersize=4, linestyle="none")
    for number, name in enumerate(series):
        axes.plot([], [], color=f"C{number}", marker="o", markersize=4, label=name)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.axvline(bar_pct, color="black", linewidth=0.5, linestyle="--")
    if linear_to is not None:
        axes.set_xscale("symlog", linthresh=linear_to)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)  # the first group on top
    axes.set_xlabel(f"{what}, with 95 % intervals; dashed: the bar")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
