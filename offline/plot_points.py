"""What there is to plot in a sweep: its points by panel, its measures, its layer sets."""

from collections.abc import Mapping
from typing import Any

from offline.errors import InputError
from offline.plot_style import LINES, label, layers_text

MEASURES = {
    "accuracy": "pair accuracy",
    "margin": "margin (nats per token)",
    "exact": "exact answers",
    "controls": "controls kept",
    "perplexity": "perplexity",
}
POSITIONS = {
    "all": "all positions",
    "text": "text only",
    "image": "image only",
    "prompt": "prompt only",
    "generation": "generation only",
}

Sweep = Mapping[str, Any]
Point = Mapping[str, Any]
Layers = tuple[int, ...]


def groups_of(sweep: Sweep) -> dict[str, list[Point]]:
    """Points by vector and positions; the positions are named where there are several."""
    if not sweep["points"]:
        raise InputError("the sweep holds no points, so there is nothing to plot")
    several = len({point["positions"] for point in sweep["points"]}) > 1
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in sweep["points"]:
        groups.setdefault((point["vector"], point["positions"]), []).append(point)
    titles = [
        label(v, 24) + (f", {POSITIONS.get(p, label(p))}" if several else "") for v, p in groups
    ]
    # Two long names may begin alike.
    unique = [t if titles.count(t) == 1 else f"{t} ({n})" for n, t in enumerate(titles, 1)]
    return dict(zip(unique, groups.values(), strict=True))


def layers_of(point: Point) -> Layers:
    return tuple(point["layers"])


def ascending(layers: Layers) -> tuple[int, Layers]:
    """Sorts single layers first."""
    return len(layers), layers


def measured(sweep: Sweep) -> list[str]:
    """The measures to show, the metric first; margin always, since accuracy saturates."""
    metric = sweep["metric"]
    wanted = dict.fromkeys([metric, "margin", "controls", "perplexity"])
    return [m for m in wanted if any(point[m] is not None for point in sweep["points"])]


def highlighted_sets(sweep: Sweep) -> list[Layers]:
    """At most six layer sets, ascending: the chosen one, then those of the best allowed points."""
    metric, chosen = sweep["metric"], sweep["chosen"]
    ranked = sorted(sweep["points"], key=lambda p: (not p["allowed"], -p[metric]))
    first = [] if chosen is None else [sweep["points"][chosen]]
    sets = list(dict.fromkeys(layers_of(point) for point in [*first, *ranked]))
    return sorted(sets[: len(LINES)], key=ascending)


def set_name(layers: Layers) -> str:
    return label(("layer " if len(layers) == 1 else "layers ") + layers_text(layers))


def number(value: float) -> str:
    """Two decimals, without the zero that says nothing: .87, 1.00, -.35, 12.3, 456."""
    if abs(value) >= 10:
        return f"{value:.3g}"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"
