"""The tables as a person reads them."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.testbed.store import Result
from benchmarks.testbed.summary import AT_POINT, FREE

console = Console(stderr=True)
_SHARES = ("perplexity increase",)


def tell(seed: int, text: str) -> None:
    """One line of progress."""
    console.print(f"seed {seed}: {text}")


def cell(figure: Mapping[str, float] | None, name: str = "") -> str:
    """`0.874 ± 0.021`, without the spread where there is one number only."""
    if figure is None:
        return ""
    if any(name.startswith(share) for share in _SHARES):
        text = f"{figure['mean']:+.1%}"
        return text if figure["n"] < 2 else f"{text} ± {figure['sd']:.1%}"
    text = f"{figure['mean']:.3f}"
    return text if figure["n"] < 2 else f"{text} ± {figure['sd']:.3f}"


def main_table(document: Mapping[str, Any], metric: str) -> None:
    """Within the limits, at GrAInS's point, and without limits."""
    out = Console(width=170)
    names = [metric, "margin", "controls", "perplexity increase", f"{metric} {AT_POINT}"]
    names += [f"{name}, {FREE}" for name in (metric, "controls", "perplexity increase")]
    rows = Table(title=document["title"], caption=document["note"], title_justify="left")
    rows.add_column("method")
    for name in names:
        rows.add_column(name, justify="right")
    for row in document["rows"]:
        rows.add_row(row["method"], *(cell(row["values"].get(name), name) for name in names))
    out.print(rows)
    for row in document["rows"]:
        points = [point_text(chosen["point"]) for chosen in row["chosen"][:6]]
        if points:
            more = ", ..." if len(row["chosen"]) > 6 else ""
            out.print(f"{row['method']}: {', '.join(points)}{more}")


def point_text(point: Result | None) -> str:
    """Layers and strength, or rank, rate and epochs."""
    if point is None:
        return "none allowed"
    if "layers" in point:
        return f"{'+'.join(map(str, point['layers']))} at {point['strength']:g}"
    return f"rank {point['rank']}, {point['rate']:g}, {point['epochs']} epochs"


def ablation_table(document: Mapping[str, Any]) -> None:
    names = [column["name"] for column in document["columns"]]
    rows = Table(title=document["title"], caption=document["note"], title_justify="left")
    for name in ("variant", *names):
        rows.add_column(name.replace("_", " "), justify="left" if name == "variant" else "right")
    for row in document["rows"]:
        rows.add_row(row["method"], *(cell(row["values"].get(name), name) for name in names))
    Console(width=170).print(rows)
