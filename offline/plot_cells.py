"""The heat map of a sweep: its metric by layer set and strength."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from offline.plot_points import MEASURES, Point, Sweep, ascending, groups_of, layers_of, number
from offline.plot_style import INK, LESS, MORE, MUTED, STYLE, SURFACE, label, layers_text

_PER_BAND = 4  # panels beside each other, at most
_HATCH = "//"
_MOST_WRITTEN = 18  # columns whose cells still have room for a number


def heat_map(sweep: Sweep) -> Figure:
    """The metric by layer set and strength, one panel per vector and positions.

    Colours are relative to the model without steering; hatched cells break a limit.

    Args:
        sweep: an object of kind "grains-sweep".

    Raises:
        InputError: it holds no points.
    """
    groups, metric = groups_of(sweep), sweep["metric"]
    differences = [p[metric] - sweep["base"][metric] for p in sweep["points"]]
    furthest = max(map(abs, differences)) or 1.0
    high = [len({layers_of(p) for p in points}) for points in groups.values()]
    wide = [len({p["strength"] for p in points}) for points in groups.values()]
    across = min(len(groups), max(1, 20 // max(wide)), _PER_BAND)
    bands = -(-len(groups) // across)
    with matplotlib.rc_context(STYLE):
        cell = 0.5 if max(wide) <= _MOST_WRITTEN else 0.25
        size = (across * (1.0 + cell * max(wide)), 1.3 + bands * (0.8 + 0.3 * max(high)))
        figure = Figure(figsize=(max(5.6, size[0]), size[1]), layout="constrained")
        grid = figure.subplots(bands, across, squeeze=False).flatten()
        for index, (title, points) in enumerate(groups.items()):
            _cells(grid[index], sweep, points, furthest)
            grid[index].set_title(title)
        for axes in grid[len(groups) :]:
            axes.remove()
        _explain_cells(figure, sweep)
    return figure


def _cells(axes: Axes, sweep: Sweep, points: Sequence[Point], furthest: float) -> None:
    metric = sweep["metric"]
    base = sweep["base"][metric]
    sets = sorted({layers_of(point) for point in points}, key=ascending)
    strengths = sorted({point["strength"] for point in points})
    chosen = None if sweep["chosen"] is None else sweep["points"][sweep["chosen"]]
    for point in points:
        x, y = strengths.index(point["strength"]), sets.index(layers_of(point))
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5), 1, 1, facecolor=_tint((point[metric] - base) / furthest),
                edgecolor=SURFACE, linewidth=1.2, hatch=None if point["allowed"] else _HATCH,
            )
        )  # fmt: skip
        if len(strengths) <= _MOST_WRITTEN:
            axes.text(x, y, number(point[metric]), ha="center", va="center", fontsize=7.5)
        if point is chosen:
            corner = (x - 0.46, y - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, ec=INK, lw=2, zorder=3))
    axes.set_xlim(-0.5, len(strengths) - 0.5)
    axes.set_ylim(-0.5, len(sets) - 0.5)
    step = 1 if len(strengths) <= _MOST_WRITTEN else 4
    axes.set_xticks(range(0, len(strengths), step), [f"{s:g}" for s in strengths[::step]])
    axes.set_yticks(range(len(sets)), [label(layers_text(layers), 20) for layers in sets])
    axes.set_xlabel("strength")
    axes.set_ylabel("layers")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _tint(share: float) -> str:
    """A colour for a difference in [-1, 1] of the furthest one."""
    if share == 0:
        return SURFACE
    shades = MORE if share > 0 else LESS
    return shades[min(len(shades) - 1, int(abs(share) * len(shades)))]


def _explain_cells(figure: Figure, sweep: Sweep) -> None:
    metric = sweep["metric"]
    handles = [
        Patch(facecolor=MORE[5], label=f"above the base, {number(sweep['base'][metric])}"),
        Patch(facecolor=LESS[5], label="below it"),
    ]
    if not all(point["allowed"] for point in sweep["points"]):
        handles.append(Patch(fc="none", ec=MUTED, hatch=_HATCH, label="breaks a limit"))
    if sweep["chosen"] is not None:
        handles.append(Patch(fc="none", ec=INK, linewidth=2, label="chosen"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), title=MEASURES[metric]
    )
