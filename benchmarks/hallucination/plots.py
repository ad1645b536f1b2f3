"""The table and the doses as pictures."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.hallucination.rivals import GRAINS, TITLES
from benchmarks.testbed.choice import LIMITS
from benchmarks.testbed.store import Result
from offline.plot_style import GRID, INK, LINES, MUTED, STYLE, SURFACE

_CURVES = {
    "hallucination": "hallucination (absent objects)",
    "present": "right about present objects",
    "controls": "controls",
}


def comparison(document: Mapping[str, Any]) -> Figure:
    """Per method hallucination within the limits (filled, with its spread) and without (hollow),
    and what each does to questions about present objects."""
    rows = list(reversed(document["rows"]))
    base = document["rows"][0]["values"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 1.1 + 0.3 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name, label in zip(
            panels,
            ("hallucination", "present"),
            ("hallucination rate on test", "right about present objects"),
            strict=True,
        ):
            axes.axvline(base[name]["mean"], color=MUTED, linestyle=(0, (4, 3)), zorder=0)
            for height, row in enumerate(rows):
                own = row["values"][name]
                free = row["values"].get(f"{name}, without limits")
                colour = LINES[0] if row["method"] == TITLES[GRAINS] else INK
                axes.errorbar(
                    own["mean"], height, xerr=own["sd"], fmt="o", color=colour, capsize=3,
                    markersize=6,
                )  # fmt: skip
                if free is not None:
                    axes.plot(free["mean"], height, "o", color=colour, mfc=SURFACE, zorder=1)
            axes.set_xlim(-0.04, 1.04)
            axes.set_xlabel(label)
            axes.grid(axis="x", color=GRID)
        panels[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
        figure.suptitle("filled: within limits, hollow: without; dashed: base", fontsize=9)
    return figure


def doses(seeds: Mapping[int, Mapping[str, Result]]) -> Figure:
    """GrAInS on validation at many strengths, at the layers that were chosen: means over seeds,
    seeds as thin lines."""
    strengths = next(iter(seeds.values()))["doses"]["strengths"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.9), layout="constrained")
        axes = figure.subplots()
        for (name, label), colour, marker in zip(_CURVES.items(), LINES, "osD", strict=False):
            curves = [
                [found[name] for found in results["doses"]["figures"]] for results in seeds.values()
            ]
            for curve in curves:
                axes.plot(strengths, curve, color=colour, linewidth=0.7, alpha=0.5)
            middle = [mean(values) for values in zip(*curves, strict=True)]
            axes.plot(strengths, middle, color=colour, marker=marker, markersize=4, label=label)
        for results in seeds.values():
            point = results[GRAINS]["point"]
            if point is not None:
                axes.axvline(point["strength"], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.axhline(LIMITS.min_controls or 0.0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlabel("strength (share of ||h||; dotted: chosen, one line per seed)")
        axes.set_ylabel("share of questions, validation")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=3)
    return figure
