"""Memory, slots and requests over time, as one picture."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from offline.plot_style import LINES, MUTED, STYLE


def over_time(document: dict[str, Any]) -> Figure:
    """Three panels over the minutes of all phases; a dashed line where a phase begins."""
    phases = document["phases"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 6.0), layout="constrained")
        memory, slots, requests = figure.subplots(3, 1, sharex=True)
        offset = 0.0
        for index, phase in enumerate(phases):
            series = phase["series"]
            minutes = [offset + point["seconds"] / 60 for point in series]
            for axes in (memory, slots, requests):
                if index:
                    axes.axvline(offset, color=MUTED, linestyle=(0, (4, 3)))
            for colour, name in zip(LINES, series[0]["rss_mib"], strict=False):
                values = [point["rss_mib"][name] for point in series]
                memory.plot(minutes, values, color=colour, label=None if index else name)
            for axes, colour, source, name, label in (
                (slots, LINES[0], "workers", "slots_in_use", "slots in use"),
                (slots, MUTED, "workers", "slots", "slots"),
                (requests, LINES[0], "metrics", "running", "running"),
                (requests, LINES[1], "workers", "requests", "in the worker's table"),
                (requests, LINES[2], "workers", "waiting", "waiting for a slot"),
            ):
                values = [point[source][name] for point in series]
                axes.plot(
                    minutes, values, color=colour, linewidth=1, label=None if index else label
                )
            memory.annotate(
                f"{phase['name']}: {phase['slots']} slots", (offset, 1.02),
                xycoords=("data", "axes fraction"), color=MUTED, fontsize=8,
            )  # fmt: skip
            offset = minutes[-1] if minutes else offset
        memory.set_ylabel("resident memory, MiB")
        slots.set_ylabel("slots")
        requests.set_ylabel("requests")
        requests.set_xlabel("minutes")
        for axes in (memory, slots, requests):
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
