"""Small charts of one artifact: its layers, and its completeness gaps."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offline.plot_style import INK, LINES, MUTED, STYLE, SURFACE

Row = dict[str, Any]
_SIZE = (3.3, 1.75)  # inches; three fit beside each other on a desk, one on a phone
_BINS = 24
_SMALLEST = 1e-6  # where a gap counts as none


def layer_chart(rows: Sequence[Row], name: str, title: str, recommended: Sequence[int]) -> Figure:
    """One figure of every layer; recommended layers are large squares, the others small dots."""
    known = [(row["layer"], row[name]) for row in rows if row[name] is not None]
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(title)
        axes.plot(*zip(*known, strict=True), color=LINES[0], linewidth=1.2, marker="o", ms=2.5)
        picked = [point for point in known if point[0] in recommended]
        if picked:
            axes.plot(
                *zip(*picked, strict=True), linestyle="none", marker="s", markersize=6.5,
                color=LINES[1], markeredgecolor=SURFACE,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(min(row["layer"] for row in rows) - 0.5, rows[-1]["layer"] + 0.5)
        axes.set_xlabel("layer")
        values = [value for _, value in known]
        if min(values) >= 0 and max(values) <= 1:
            axes.set_ylim(0, 1.04)
    return figure


def gap_chart(gaps: Sequence[float], tolerance: float | None) -> Figure:
    """How many examples have which completeness gap, on a logarithmic scale."""
    places = [math.log10(max(gap, _SMALLEST)) for gap in gaps]
    low, high = min(places), max(places)
    if tolerance is not None:
        low, high = min(low, math.log10(tolerance)), max(high, math.log10(tolerance))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel("examples by completeness gap", (6.4, 2.1))
        edges = [low + (high - low) * number / _BINS for number in range(_BINS + 1)]
        axes.hist(places, edges, color=LINES[0], edgecolor=SURFACE)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
        if tolerance is not None:
            at = math.log10(tolerance)
            axes.axvline(at, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            left = at > (low + high) / 2  # of the line, where the room is
            axes.annotate(
                f"tolerance {tolerance:g}", (at, 1), (-5 if left else 5, 0), va="top", color=INK,
                ha="right" if left else "left", xycoords=("data", "axes fraction"),
                textcoords="offset points",
            )  # fmt: skip
        ticks = range(low, high + 1)
        axes.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.set_xlabel("gap")
    return figure


def _panel(title: str, size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(axis="y")
    axes.tick_params(color=MUTED)
    return figure, axes
