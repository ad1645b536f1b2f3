"""An evaluation as a table for people."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from offline.console import stdout

_WIDE = 100  # columns


def show(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints goals first, then side effects; every value and difference with its interval."""
    console = console or stdout()
    gap = " " if console.width >= _WIDE else "\n"
    for side_effect, title in ((False, "Goals"), (True, "Side effects")):
        rows = [row for row in document["tasks"] if row["side_effect"] == side_effect]
        if rows:
            console.print(_table(rows, document["settings"], title, gap))
    console.print(
        f"[low, high]: {document['confidence']:.0%} bootstrap intervals; differences are paired, "
        "item by item.\n"
        "better, worse: where the interval of the difference leaves out 0."
    )
    for task, settings in document["provenance"]["counts"].items():
        for setting, counts in settings.items():
            found = ", ".join(
                f"{count} {what}"
                for what, count in counts.items()
                if isinstance(count, int) and count
            )
            if found:
                console.print(f"note: {task}, {setting}: {found}")


def _table(rows: list[Mapping[str, Any]], settings: list[str], title: str, gap: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    # Where it is narrow, names are folded and intervals stand below; the verdict is always seen.
    for name in ("measured", "setting"):
        table.add_column(name, overflow="fold")
    for name in ("value", "difference", ""):
        table.add_column(name, no_wrap=True)
    for row in rows:
        what = _measured(row)
        for number, name in enumerate(settings):
            last = number == len(settings) - 1
            table.add_row(
                "\n".join(what[number:] if last else what[number : number + 1]), name,
                _cell(row["values"][name], "", gap),
                _cell(row["differences"][name], "+", gap) if name in row["differences"] else "",
                _verdict(row, name), end_section=last,
            )  # fmt: skip
    return table


def _measured(row: Mapping[str, Any]) -> list[str]:
    wish = {True: ", higher is better", False: ", lower is better", None: ""}
    metric = [] if row["metric"] == row["task"] else [row["metric"]]
    return [row["task"], *metric, f"n {row['n']}{wish[row['higher_is_better']]}"]


def _cell(estimate: Mapping[str, Any], sign: str, gap: str) -> str:
    digits = 1 if abs(estimate["value"]) >= 100 else 3
    value, low, high = (
        "-" if estimate[key] is None else f"{estimate[key]:{sign}.{digits}f}"
        for key in ("value", "low", "high")
    )
    return f"{value}{gap}[{low}, {high}]"


def _verdict(row: Mapping[str, Any], name: str) -> str:
    found = row["differences"].get(name)
    if found is None or row["higher_is_better"] is None or found["low"] is None:
        return ""
    if found["low"] <= 0 <= found["high"]:
        return ""
    return "better" if (found["low"] > 0) == row["higher_is_better"] else "worse"
