"""Dose-response curves: every measure of a sweep against strength.

What a point is, is never told by colour alone: allowed points are filled and the others hollow,
the chosen one is a star, and layer sets differ in their markers.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from offline.plot_points import (
    MEASURES,
    Layers,
    Point,
    Sweep,
    groups_of,
    highlighted_sets,
    layers_of,
    measured,
    set_name,
)
from offline.plot_style import INK, LINES, MUTED, STYLE, SURFACE

_MARKERS = "osD^vP"
_PER_BAND = 4  # panels beside each other


def dose_response(sweep: Sweep) -> Figure:
    """Metric, margin, controls and perplexity against strength, as far as they were measured.

    One column of panels per vector and positions, one row per measure, one line per layer set. Of
    more than six layer sets the best six have colours.

    Args:
        sweep: an object of kind "grains-sweep".

    Raises:
        InputError: it holds no points.
    """
    groups, rows, highlighted = groups_of(sweep), measured(sweep), highlighted_sets(sweep)
    across = min(len(groups), _PER_BAND)
    bands = -(-len(groups) // across)
    with matplotlib.rc_context(STYLE):
        size = (max(5.6, 0.7 + 2.65 * across), 1.0 + 1.7 * len(rows) * bands)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(bands * len(rows), across, squeeze=False)
        drawn: dict[str, list[Axes]] = {measure: [] for measure in rows}
        for index, (title, points) in enumerate(groups.items()):
            band, column = divmod(index, across)
            for row, measure in enumerate(rows):
                axes = grid[band * len(rows) + row][column]
                _curves(axes, sweep, measure, points, highlighted)
                axes.set_title(title if row == 0 else "")
                axes.set_xlabel("strength" if row == len(rows) - 1 else "")
                axes.set_ylabel(MEASURES[measure] if column == 0 else "")
                drawn[measure].append(axes)
        for row in grid:
            for axes in row:
                if not axes.has_data():
                    axes.remove()
        for measure, panels in drawn.items():
            _limit_and_range(sweep, measure, panels)
        _explain_curves(figure, sweep, highlighted)
    return figure


def _curves(
    axes: Axes, sweep: Sweep, measure: str, points: Sequence[Point], highlighted: list[Layers]
) -> None:
    base = sweep["base"][measure]
    if base is not None:
        axes.axhline(base, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    lines: dict[Layers, list[Point]] = {}
    for point in points:
        if point[measure] is not None:
            lines.setdefault(layers_of(point), []).append(point)
    for layers, members in sorted(lines.items(), key=lambda item: item[0] in highlighted):
        known = layers in highlighted
        colour = LINES[highlighted.index(layers)] if known else MUTED
        marker = _MARKERS[highlighted.index(layers)] if known else "."
        members.sort(key=lambda point: point["strength"])
        x, y = [p["strength"] for p in members], [p[measure] for p in members]
        axes.plot(x, y, color=colour, linewidth=1.4 if known else 0.6, alpha=1 if known else 0.5)
        if not known and len(members) > 1:
            continue  # hundreds of marks would hide the lines that matter
        for allowed, face in ((True, colour), (False, SURFACE)):
            at = [i for i, point in enumerate(members) if bool(point["allowed"]) is allowed]
            axes.plot(
                [x[i] for i in at], [y[i] for i in at], linestyle="none", marker=marker,
                markersize=4.5 if known else 3, color=colour, markerfacecolor=face, zorder=3,
            )  # fmt: skip
    chosen = None if sweep["chosen"] is None else sweep["points"][sweep["chosen"]]
    if chosen is not None and chosen in points and chosen[measure] is not None:
        axes.plot(
            chosen["strength"], chosen[measure], marker="*", markersize=15, color=INK,
            markeredgecolor=SURFACE, zorder=4,
        )  # fmt: skip
    axes.grid(axis="y")


def _limit_and_range(sweep: Sweep, measure: str, panels: Sequence[Axes]) -> None:
    """Draws the measure's limit, if there is one, and gives all panels one scale."""
    limits, base = sweep["limits"], sweep["base"][measure]
    limit = limits.get("min_controls") if measure == "controls" else None
    rise = limits.get("max_perplexity_increase") if measure == "perplexity" else None
    if rise is not None and base is not None:
        limit = base * (1 + rise)
    values = [p[measure] for p in sweep["points"] if p[measure] is not None]
    for axes in panels:
        if limit is not None:
            axes.axhline(limit, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        if measure == "perplexity" and max(values) > 5 * min(values):
            axes.set_yscale("log")
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)


def _explain_curves(figure: Figure, sweep: Sweep, highlighted: list[Layers]) -> None:
    handles = [
        Line2D([], [], color=LINES[at], marker=_MARKERS[at], markersize=4.5, label=set_name(layers))
        for at, layers in enumerate(highlighted)
    ]
    others = len({layers_of(point) for point in sweep["points"]}) - len(highlighted)
    if others:
        text = f"{others} other layer set" + ("s" if others > 1 else "")
        handles.append(Line2D([], [], color=MUTED, linewidth=0.6, label=text))
    handles.append(Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), label="base, not steered"))
    if any(sweep["limits"].get(k) is not None for k in ("min_controls", "max_perplexity_increase")):
        handles.append(Line2D([], [], color=INK, linestyle=(0, (1, 2)), label="limit"))
    marks: dict[str, dict[str, Any]] = {}
    if not all(point["allowed"] for point in sweep["points"]):
        marks["breaks a limit (hollow)"] = {"marker": "o", "color": MUTED, "mfc": SURFACE}
    if sweep["chosen"] is not None:
        marks["chosen"] = {"marker": "*", "color": INK, "markersize": 11}
    handles += [Line2D([], [], linestyle="none", label=t, **m) for t, m in marks.items()]
    columns = max(2, int(figure.get_figwidth() / 1.9))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
