"""What a person sees of a sweep: the best points, and the best of every set of layers."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_MEASURES = ("accuracy", "exact", "margin", "controls", "perplexity")
_TOP = 10


def show(document: Mapping[str, Any]) -> None:
    """Prints a "grains-sweep" document as a table on stdout."""
    points, base, metric = document["points"], document["base"], document["metric"]
    order = sorted(
        range(len(points)),
        key=lambda index: (
            points[index]["allowed"], points[index][metric], points[index]["margin"],
            -abs(points[index]["strength"]),
        ),
        reverse=True,
    )  # fmt: skip
    top, rest = order[:_TOP], order[_TOP:]
    seen = {_layer_set(points[index]) for index in top}
    best = []
    for index in rest:
        if _layer_set(points[index]) not in seen:
            seen.add(_layer_set(points[index]))
            best.append(index)
    count = sum(point["allowed"] for point in points)
    table = Table(
        title=f"{count} of {len(points)} points keep the limits; best first by {metric}",
        caption="* chosen; (not allowed)",
    )
    for column in ("", "vector", "layers", "strength", "positions", *_MEASURES):
        table.add_column(column, justify="left" if column in ("", "vector", "layers") else "right")
    table.add_row("", "base", "-", "-", "-", *_cells(base, base), end_section=True)
    for number, index in enumerate([*top, *best]):
        point = points[index]
        cells = [
            point["vector"], layer_text(point["layers"]), f"{point['strength']:g}",
            point["positions"], *_cells(point, base),
        ]  # fmt: skip
        if not point["allowed"]:
            cells[0] = f"({cells[0]})"
        table.add_row(
            "*" if index == document["chosen"] else "",
            *cells,
            style=None if point["allowed"] else "dim",
            end_section=number == len(top) - 1,
        )
    Console(markup=False).print(table)


def layer_text(layers: list[int]) -> str:
    """`8-15,20` for the layers 8 to 15 and 20."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _layer_set(point: Mapping[str, Any]) -> tuple[str, tuple[int, ...], str]:
    return point["vector"], tuple(point["layers"]), point["positions"]


def _cells(found: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    cells = ["-" if found[name] is None else f"{found[name]:.3f}" for name in _MEASURES[:-1]]
    perplexity = found["perplexity"]
    if perplexity is None:
        return [*cells, "-"]
    return [*cells, f"{perplexity:.4g} ({perplexity / base['perplexity'] - 1:+.1%})"]
