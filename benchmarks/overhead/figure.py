"""Ratios to plain as one picture: every round a dot, the median a bar, the target a line."""

import statistics
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from benchmarks.overhead.arms import PLAIN
from benchmarks.overhead.summary import METRICS, Line
from offline.plot_style import INK, LINES, MUTED, STYLE

_WIDTH = 0.7  # of the space between two arms, shared by all sizes


def ratios(found: Sequence[Line], title: str) -> Figure:
    """One panel per benchmark and metric; within it a group per arm and a colour per batch size."""
    shown = [line for line in found if line.arm != PLAIN and line.ratios]
    panels = list(dict.fromkeys((line.bench, line.metric) for line in shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 2.4 * len(panels)), layout="constrained")
        axes = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0]) if panels else []
        for place, (bench, metric) in zip(axes, panels, strict=True):
            _panel(place, [x for x in shown if (x.bench, x.metric) == (bench, metric)])
            place.set_title(f"vllm bench {bench}: {METRICS[metric]}, ratio to plain vLLM")
        figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure


def _panel(axes: matplotlib.axes.Axes, found: Sequence[Line]) -> None:
    arms = list(dict.fromkeys(line.arm for line in found))
    sizes = sorted({line.size for line in found})
    step = _WIDTH / len(sizes)
    axes.axhline(1.0, color=MUTED, linewidth=0.8)
    for line in found:
        x = arms.index(line.arm) + step * (sizes.index(line.size) - (len(sizes) - 1) / 2)
        colour = LINES[sizes.index(line.size)]
        axes.plot([x] * len(line.ratios), line.ratios, "o", color=colour, markersize=3, alpha=0.45)
        middle = statistics.median(line.ratios)
        axes.plot([x - step / 3, x + step / 3], [middle] * 2, color=colour, linewidth=2)
        if line.low is not None and line.high is not None:
            axes.plot([x, x], [line.low, line.high], color=colour, linewidth=1)
    for place, arm in enumerate(arms):
        target = next((line.target for line in found if line.arm == arm), None)
        if target is not None:
            reach = [place - 0.45, place + 0.45]
            axes.plot(reach, [target] * 2, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    # The rounds and the targets decide what is shown; an interval may go on beyond the edge.
    shown = [1.0, *(r for line in found for r in line.ratios), *(x.target or 1.0 for x in found)]
    margin = 0.08 * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xticks(range(len(arms)), arms)
    axes.grid(axis="y")
    for place, size in enumerate(sizes):
        axes.plot([], [], color=LINES[place], linewidth=2, label=f"batch {size}")
    axes.plot([], [], color=INK, linewidth=0.8, linestyle=(0, (3, 2)), label="target")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
