"""Every chart of the page with the sentence that stands for it."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from offline.plot_points import MEASURES, layers_of, set_name
from offline.plots import dose_response, heat_map
from offline.report.charts import gap_chart, layer_chart
from offline.report.facts import layer_rows, mapping, tolerance
from offline.report.inputs import Subject
from offline.report.text import visible
from offline.report.theme import chart

_LAYER_CHARTS = {
    "explained_variance": "explained variance",
    "stability": "split-half stability",
    "cosine": "cos(v+, v-)",
    "norm": "reference norm ||h||",
    "raw_norm": "raw norm of the direction",
}


@dataclass(frozen=True)
class SweepFigures:
    """The two plots of a sweep."""

    heat: Markup
    dose: Markup


def layer_charts(subject: Subject, prefix: str) -> list[Markup]:
    """A small chart per figure that the passport has."""
    rows = layer_rows(subject)
    listed = mapping(subject.vector.passport.get("recommended")).get("layers") or []
    charts = []
    for name, title in _LAYER_CHARTS.items():
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            text = f"{title} by layer, from {min(values):.3g} to {max(values):.3g}; table follows"
            figure = layer_chart(rows, name, title, listed)
            charts.append(chart(figure, text, f"{prefix}-{name}"))
    return charts


def gap_figure(subject: Subject, prefix: str) -> Markup | None:
    """The histogram of completeness gaps, if the records have any."""
    gaps = [record["gap"] for record in subject.records or [] if record["gap"] is not None]
    if not gaps:
        return None
    text = f"Histogram of {len(gaps)} completeness gaps, from {min(gaps):.2g} to {max(gaps):.2g}"
    return chart(gap_chart(gaps, tolerance(subject)), text, f"{prefix}-gaps")


def sweep_figures(sweep: dict[str, Any], prefix: str) -> SweepFigures:
    """Heat map and curves; all their numbers are in the table of points."""
    metric, points = sweep["metric"], sweep["points"]
    values = [point[metric] for point in points]
    text = (
        f"{MEASURES[metric]} from {min(values):.3g} to {max(values):.3g} over {len(points)} "
        f"points, {sweep['base'][metric]:.3g} without steering"
    )
    if sweep["chosen"] is not None:
        best = points[sweep["chosen"]]
        text += (
            f"; chosen: {visible(best['vector'])}, {set_name(layers_of(best))}, "
            f"strength {best['strength']:g}, {best[metric]:.3g}"
        )
    return SweepFigures(
        heat=chart(heat_map(sweep), f"Heat map by layers and strength: {text}.", f"{prefix}-heat"),
        dose=chart(dose_response(sweep), f"Curves against strength: {text}.", f"{prefix}-dose"),
    )
