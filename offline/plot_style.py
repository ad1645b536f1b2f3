"""What all plots look like, and how they become files.

Colours come from one small palette, so that the report can put its theme's colours for them.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogFormatterMathtext, StrMethodFormatter

from grains_vllm.vectors import write_aside
from offline.errors import InputError

INK, MUTED, GRID, SURFACE = "#1f2329", "#656d76", "#d9dee4", "#fefefe"
LINES = ("#0b6bb3", "#c4500c", "#0a7d5a", "#a04a86", "#7a6a00", "#4d5bbf")
# Two ways from the neutral middle, for less and for more than the reference; read with ink on it.
LESS = ("#fdf1e7", "#fbe3cf", "#f9d4b6", "#f6c59d", "#f3b584", "#efa56b", "#ea9452", "#e48339")
MORE = ("#eaf3fb", "#d5e7f7", "#bfdaf3", "#a9cdee", "#92c0e9", "#7ab2e3", "#61a4dc", "#4895d4")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": SURFACE,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "text.color": INK,
    "text.parse_math": False,  # a "$" in somebody's name is a dollar
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as .png or .svg, aside first, without a date so that it is reproducible.

    Raises:
        InputError: the name ends in something else.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: a plot's name ends in .png or .svg")
    write_aside(path, rendered(figure, kind))


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as a "png" or "svg" file."""
    _write_numbers_plainly(figure)
    payload = io.BytesIO()
    metadata = {"Date": None, "Creator": "grains"} if kind == "svg" else None
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "grains"}):
        figure.savefig(payload, format=kind, metadata=metadata)
    return payload.getvalue()


def _write_numbers_plainly(figure: Figure) -> None:
    """Axes write powers of ten as mathematics, which `text.parse_math` leaves as its source."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(LogFormatter())


def layers_text(layers: Sequence[int]) -> str:
    """`[1, 2, 3, 7]` as "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def label(text: str, longest: int = 32) -> str:
    """A name of somebody's as one short printable line."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
