"""The table and the doses as pictures."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.testbed.choice import LIMITS
from benchmarks.testbed.methods import GRAINS, TITLES
from benchmarks.testbed.store import Result
from benchmarks.testbed.study import DOSED
from benchmarks.testbed.summary import FREE
from offline.plot_style import GRID, INK, LINES, MUTED, STYLE, SURFACE

LABELS = {"exact": "exact answers", "accuracy": "pair accuracy"}
_MARKERS = "osD^vP"


def comparison(document: Mapping[str, Any], metric: str) -> Figure:
    """Per method the metric within the limits (filled, with its spread) and without (hollow)."""
    rows = list(reversed(document["rows"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 0.9 + 0.29 * len(rows)), layout="constrained")
        axes = figure.subplots()
        base = next(row for row in rows if row["method"] == TITLES["base"])
        axes.axvline(base["values"][metric]["mean"], color=MUTED, linestyle=(0, (4, 3)), zorder=0)
        for height, row in enumerate(rows):
            own, free = (row["values"].get(name) for name in (metric, f"{metric}, {FREE}"))
            colour = LINES[0] if row["method"] == TITLES[GRAINS] else INK
            axes.errorbar(
                own["mean"], height, xerr=own["sd"], fmt="o", color=colour, capsize=3, markersize=6
            )
            if free is not None:
                axes.plot(free["mean"], height, "o", color=colour, mfc=SURFACE, zorder=1)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.set_xlim(-0.02, 1.04)
        axes.set_xlabel(f"{LABELS[metric]} on test (filled: within limits, hollow: without)")
        axes.grid(axis="x", color=GRID)
    return figure


def doses(seeds: Mapping[int, Mapping[str, Result]], metric: str) -> Figure:
    """Metric, margin, controls and perplexity against strength: means over seeds (GrAInS's
    seeds as thin lines). Every method at the layers that its own validation chose."""
    panels = (metric, "margin", "controls", "perplexity increase")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.9, 4.6), layout="constrained")
        grid = figure.subplots(2, 2)
        for panel, axes in zip(panels, grid.flat, strict=True):
            for name, colour, marker in zip(DOSED, LINES, _MARKERS, strict=True):
                curves = [_curve(results, name, panel) for results in seeds.values()]
                strengths = next(iter(seeds.values()))[f"dose-{name}"]["strengths"]
                for curve in curves if name == GRAINS else []:
                    axes.plot(strengths, curve, color=colour, linewidth=0.7, alpha=0.5)
                middle = [mean(values) for values in zip(*curves, strict=True)]
                title = TITLES[name.removesuffix("-0")]
                axes.plot(
                    strengths, middle, color=colour, marker=marker, markersize=3.5, label=title
                )
            axes.set_title(LABELS.get(panel, panel))
            axes.grid(axis="y")
            axes.axvline(0, color=MUTED, linewidth=0.8)
        _limits(grid.flat)
        for axes in grid[1]:
            axes.set_xlabel("strength (share of ||h||)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _curve(results: Mapping[str, Result], name: str, panel: str) -> list[float]:
    found = results[f"dose-{name}"]["measures"]
    if panel != "perplexity increase":
        return [measures[panel] for measures in found]
    base = results["base"]["validation"]["perplexity"]
    return [measures["perplexity"] / base - 1 for measures in found]


def _limits(panels: Sequence[Any]) -> None:
    """Dotted lines at the limits; perplexity grows far beyond what matters."""
    for axes, limit in (
        (panels[2], LIMITS.min_controls),
        (panels[3], LIMITS.max_perplexity_increase),
    ):
        axes.axhline(limit, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    panels[3].set_ylim(-0.05, 1.0)
