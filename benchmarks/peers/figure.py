"""Tokens per second of every contestant: a panel per batch size, every round a dot."""

import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from offline.plot_style import LINES, MUTED, STYLE

# [contestant][batch] -> tokens per second, by round
Speeds = Mapping[str, Mapping[str, list[float]]]


def speeds(
    found: Speeds, ratios: Mapping[str, Mapping[str, float]], bases: Mapping[str, str], title: str
) -> Figure:
    """Bars of medians; a colour per base, so that a contestant is beside what it builds on.

    Args:
        ratios: [contestant][batch] -> speed over its base's, for whoever has one.
    """
    batches = list(next(iter(found.values())))
    colours = dict(zip(dict.fromkeys(bases[name] for name in found), LINES, strict=False))
    names = list(found)[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.32 * len(names)), layout="constrained")
        axes: Any = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for place, batch in zip(axes, batches, strict=True):
            for y, name in enumerate(names):
                rounds = found[name][batch]
                colour = colours[bases[name]]
                middle = statistics.median(rounds)
                place.barh(y, middle, height=0.6, color=colour, alpha=0.35)
                place.plot(rounds, [y] * len(rounds), "o", color=colour, markersize=3)
                text = f" {middle:.0f}"
                if name in ratios:
                    text += f" ({ratios[name][batch]:.2f}x)"
                place.text(max(rounds), y, f" {text}", va="center", fontsize=7, color=MUTED)
            place.set_title(f"batch {batch}")
            place.set_xlim(0, 1.45 * max(max(found[name][batch]) for name in names))
            place.set_yticks(range(len(names)), names)
            place.set_xlabel("tokens/s")
            place.grid(axis="x")
        figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure
