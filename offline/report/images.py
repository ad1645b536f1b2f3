"""Images as the page shows them: a picture, and over it the grids of its tokens' scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline.report.image_field import image_tokens
from offline.report.numbers import signed
from offline.report.records import Record
from offline.report.shades import shade, written
from offline.report.text import visible

_WIDEST, _TALLEST = 400, 480  # CSS pixels
_SIGNS = {"positive": "+", "negative": "-"}


@dataclass(frozen=True)
class View:
    """A grid of cells over part of a picture.

    Attributes:
        box: (left, top, width, height) in pixels of the image.
        whole: whether that is all of it.
        shades: per class of a shade, the path through its cells, half a row above their middles and
            to be drawn one row wide.
        plus, minus: the border of the cells in T+ and T-.
        scores: of the cells, row by row, between spaces: "-" without a token, else the number, then
            "+" in T+, "-" in T-, "!" where it cannot be chosen.
        summary: all that in a sentence.
    """

    name: str
    rows: int
    columns: int
    box: tuple[str, ...]
    whole: bool
    shades: list[tuple[str, str]]
    plus: str
    minus: str
    scores: str
    summary: str


@dataclass(frozen=True)
class Image:
    """A prompt's image.

    Attributes:
        shown: its width on the page in CSS pixels.
        scale: the score of its darkest shade, the largest of its tokens: one of many image tokens
            usually counts for less than a word.
        summary: how many tokens, their sum, and how many of them are chosen.
        remarks: what else there is to know of its tokens.
    """

    name: str
    sha256: str
    thumbnail: str
    width: int
    height: int
    shown: int
    scale: float
    views: list[View]
    summary: str
    remarks: list[str]


def image_of(record: Record) -> Image | None:
    """The image of a record, if it has one."""
    image = record.get("image")
    if image is None:
        return None
    mine = [position for position, flag in enumerate(image_tokens(record)) if flag]
    scale = max((abs(record["scores"][position]) for position in mine), default=0.0)
    views = [_view(view, image, record, scale) for view in image["views"]]
    cells = sum(position is not None for view in image["views"] for position in view["positions"])
    loose = len(mine) - cells
    remarks = [f"{loose} of them in no cell (separators, crops)"] if views and loose else []
    if not views:
        remarks.append("which part of it a token stands for is not known")
    if not any(record["eligible"][position] for position in mine):
        remarks.append("image tokens cannot be chosen here")
    width, height = image["width"], image["height"]
    return Image(
        name=visible(image["name"]),
        sha256=image["sha256"],
        thumbnail=image["thumbnail"],
        width=width,
        height=height,
        shown=max(1, round(min(_WIDEST, _TALLEST * width / height))),
        scale=scale,
        views=views,
        summary=f"image: {_counted(mine, record)}",
        remarks=remarks,
    )


def chip(positions: Sequence[int], record: Record) -> tuple[str, str]:
    """What stands in the prompt for a run of image tokens: its text, and the sum of its scores."""
    total = sum(record["scores"][position] for position in positions)
    return f"image, {_tokens(len(positions))}, sum {signed(total)}", written(total)


def cell_names(record: Record) -> dict[int, str]:
    """Names of cells by position, such as "image r3 c5"; rows and columns count from 1."""
    views = (record.get("image") or {"views": []})["views"]
    names = {}
    for view in views:
        suffix = f" of {visible(view['name'])}" if len(views) > 1 else ""
        for cell, position in enumerate(view["positions"]):
            if position is not None:
                row, column = divmod(cell, view["columns"])
                names[position] = f"image r{row + 1} c{column + 1}{suffix}"
    return names


def _view(view: Mapping[str, Any], image: Mapping[str, Any], record: Record, scale: float) -> View:
    marks = _marks(view, record)
    held = [position for position in view["positions"] if position is not None]
    name, box = visible(view["name"]), view["box"]
    return View(
        name=name,
        rows=view["rows"],
        columns=view["columns"],
        box=_pixels(box, image["width"], image["height"]),
        whole=box == [0, 0, 1, 1],
        shades=_shades(view, record["scores"], scale),
        plus=_border(marks, "+", view["columns"]),
        minus=_border(marks, "-", view["columns"]),
        scores=" ".join(
            "-" if position is None else f"{record['scores'][position]:.4g}{mark}"
            for position, mark in zip(view["positions"], marks, strict=True)
        ),
        summary=f"{name}, {view['rows']} rows of {view['columns']}: {_counted(held, record)}",
    )


def _pixels(box: Sequence[float], width: int, height: int) -> tuple[str, ...]:
    """(left, top, width, height) as they are written."""
    left, top, right, bottom = box
    values = (left * width, top * height, (right - left) * width, (bottom - top) * height)
    return tuple(f"{value:.2f}".rstrip("0").rstrip(".") for value in values)


def _shades(
    view: Mapping[str, Any], scores: Sequence[float], scale: float
) -> list[tuple[str, str]]:
    columns: int = view["columns"]
    paths: dict[str, str] = {}
    classes = ["" if p is None else shade(scores[p], scale) for p in view["positions"]]
    for row in range(view["rows"]):
        for start, length, name in _runs(classes[row * columns : (row + 1) * columns]):
            paths[name] = paths.get(name, "") + f"M{start} {row}h{length}"
    return sorted(paths.items())


def _marks(view: Mapping[str, Any], record: Record) -> list[str]:
    """Of every cell: "+" in T+, "-" in T-, "!" where it cannot be chosen, else ""."""
    chosen = {position: sign for name, sign in _SIGNS.items() for position in record[name]}
    return [
        "" if p is None else chosen.get(p, "" if record["eligible"][p] else "!")
        for p in view["positions"]
    ]


def _runs(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """(start, length, name) of the runs of equal names, but for the empty name."""
    runs: list[tuple[int, int, str]] = []
    for index, name in enumerate(names):
        if runs and runs[-1][2] == name:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, name)
        else:
            runs.append((index, 1, name))
    return [run for run in runs if run[2]]


def _border(marks: Sequence[str], wanted: str, columns: int) -> str:
    """The sides of the cells with a mark, but for those that two of them share."""
    cells = [divmod(cell, columns) for cell, mark in enumerate(marks) if mark == wanted]
    among, path = set(cells), ""
    for row, column in cells:
        for near, side in (
            ((row - 1, column), f"M{column} {row}h1"),
            ((row + 1, column), f"M{column} {row + 1}h1"),
            ((row, column - 1), f"M{column} {row}v1"),
            ((row, column + 1), f"M{column + 1} {row}v1"),
        ):
            path += "" if near in among else side
    return path


def _counted(positions: Sequence[int], record: Record) -> str:
    """How many tokens, their sum, and how many of them are chosen."""
    held = set(positions)
    total = sum(record["scores"][position] for position in positions)
    plus, minus = (sum(p in held for p in record[name]) for name in ("positive", "negative"))
    return f"{_tokens(len(held))}, sum {signed(total)}, {plus} in T+, {minus} in T\N{MINUS SIGN}"


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"
