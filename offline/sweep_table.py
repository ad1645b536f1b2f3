"""What a person sees of a sweep: the best points, and the best of every set of layers."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from offline.console import stdout

_MEASURES = ("accuracy", "exact", "margin", "controls")
_TOP = 10
_NARROWEST = 80  # columns; on a narrower screen lines go on in the next, and no figure is cut


def show(document: Mapping[str, Any]) -> None:
    """Prints a "grains-sweep" document as a table on stdout."""
    points, base, metric = document["points"], document["base"], document["metric"]
    several = {name for name in ("vector", "positions") if len({p[name] for p in points}) > 1}
    order = sorted(range(len(points)), key=lambda index: _rank(points[index], metric), reverse=True)
    top, best = order[:_TOP], []
    seen = {_series(points[index]) for index in top}
    for index in order[_TOP:]:
        if _series(points[index]) not in seen:
            seen.add(_series(points[index]))
            best.append(index)
    kept = sum(point["allowed"] for point in points)
    table = Table(
        title=f"{kept} of {len(points)} points keep the limits; best by {metric}",
        caption="* chosen, x beyond a limit",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("", "vector", "layers", "positions", "strength", *_MEASURES, "ppl", ""):
        if name not in ("vector", "positions") or name in several:
            if name in ("vector", "layers", "positions"):
                # Where it is narrow, names are folded and figures stay.
                table.add_column(name, min_width=4, overflow="fold")
            else:
                table.add_column(name, justify="right", no_wrap=True)
    names = {name: "" for name in several}
    table.add_row("", *_cells({**base, **names}, base, several, "base", ""), end_section=True)
    for number, index in enumerate([*top, *best], 1):
        point = points[index]
        mark = "*" if index == document["chosen"] else "" if point["allowed"] else "x"
        layers, strength = layer_text(point["layers"]), f"{point['strength']:g}"
        table.add_row(
            mark, *_cells(point, base, several, layers, strength),
            style=None if point["allowed"] else "dim", end_section=number == len(top),
        )  # fmt: skip
    console = stdout()
    console.width = max(console.width, _NARROWEST)
    console.print(table)


def layer_text(layers: list[int]) -> str:
    """`8-15,20` for the layers 8 to 15 and 20."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _rank(point: Mapping[str, Any], metric: str) -> tuple[bool, float, float, float, int]:
    return (
        point["allowed"], point[metric], point["margin"], -abs(point["strength"]),
        -len(point["layers"]),
    )  # fmt: skip


def _series(point: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str]:
    return point["vector"], tuple(point["layers"]), point["positions"]


def _cells(
    found: Mapping[str, Any], base: Mapping[str, Any], several: set[str], layers: str, strength: str
) -> list[str]:
    cells = [found["vector"]] if "vector" in several else []
    cells.append(layers)
    cells += [found["positions"]] if "positions" in several else []
    cells.append(strength)
    cells += ["-" if found[name] is None else f"{found[name]:.3f}" for name in _MEASURES]
    if found["perplexity"] is None:
        return [*cells, "-", ""]
    change = found["perplexity"] / base["perplexity"] - 1
    return [*cells, f"{found['perplexity']:.4g}", f"{change:+.1%}"]
