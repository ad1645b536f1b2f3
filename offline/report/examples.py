"""Examples as the page shows them: every prompt token with its shade, mark and score."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from offline.report.image_field import image_tokens
from offline.report.images import Image, cell_names, chip, image_of
from offline.report.records import Record
from offline.report.shades import STEPS, shade, written
from offline.report.text import shortened, visible
from offline.report.tokens import Spelling, readable, spelling

_DIM_SHADES = 4  # template and special tokens are paler: they cannot be chosen


@dataclass(frozen=True)
class Token:
    """A prompt token, or a run of image tokens.

    Attributes:
        space: what stands before the mark of a chosen token.
        text: as a person reads it.
        classes: of its shade (m1 to m8, l1 to l8), mark (plus, minus) and eligibility (dim), or
            "chip" for a run.
        score: in nats, four digits.
        count: how many tokens it stands for.
    """

    space: str
    text: str
    classes: str
    score: str
    count: int = 1


@dataclass(frozen=True)
class Example:
    """One example; `scale` is the score of the darkest shade.

    Attributes:
        length: how many tokens the prompt has.
        plus, minus: the tokens of T+ and T- with their positions; cells of the image have none,
            they go by their names.
    """

    id: str
    begins: str
    length: int
    tokens: list[Token]
    plus: list[tuple[int | None, Token]]
    minus: list[tuple[int | None, Token]]
    scale: float
    used: bool
    above: bool
    gap: float | None
    f_input: float | None
    f_baseline: float | None
    points: int | None
    total: float
    reason: str
    image: Image | None


def examples(records: Sequence[Record], tolerance: float | None) -> tuple[list[Example], Spelling]:
    """All examples in the file's order, and how their tokens are spelled."""
    kind = spelling(record["tokens"] for record in records)
    return [_example(record, kind, tolerance) for record in records], kind


def _example(record: Record, kind: Spelling, tolerance: float | None) -> Example:
    scores, eligible = record["scores"], record["eligible"]
    scale = max((abs(s) for s, fits in zip(scores, eligible, strict=True) if fits), default=0.0)
    marks = {position: "plus" for position in record["positive"]}
    marks |= {position: "minus" for position in record["negative"]}
    texts = readable(record["tokens"], kind)
    pictured, cells = image_tokens(record), cell_names(record)
    tokens = [
        _token(text, score, fits, scale, marks.get(position))
        for position, (text, score, fits) in enumerate(zip(texts, scores, eligible, strict=True))
    ]
    chosen = {
        name: [_chosen(p, tokens[p], cells, pictured[p]) for p in record[name]]
        for name in ("positive", "negative")
    }
    content = [
        text
        for text, fits, image in zip(texts, eligible, pictured, strict=True)
        if fits and not image
    ]
    if any(pictured) and not content:  # only image tokens may be chosen
        content = [text for text, image in zip(texts, pictured, strict=True) if not image]
    begins = (" " if kind is Spelling.plain else "").join(content).replace("↵", " ")
    return Example(
        id=visible(record["id"]),
        begins=shortened(begins, 90),
        length=len(tokens),
        tokens=_collapsed(tokens, pictured, record),
        plus=chosen["positive"],
        minus=chosen["negative"],
        scale=scale,
        used=record["used"],
        above=tolerance is not None and record["gap"] is not None and record["gap"] > tolerance,
        gap=record["gap"],
        f_input=record["f_input"],
        f_baseline=record["f_baseline"],
        points=record["points"],
        total=sum(scores),
        reason=_reason(record),
        image=image_of(record),
    )


def _collapsed(tokens: list[Token], pictured: Sequence[bool], record: Record) -> list[Token]:
    """The tokens with a chip for every run of image tokens."""
    shown = []
    for image, run in groupby(range(len(tokens)), key=pictured.__getitem__):
        positions = list(run)
        if image:
            text, total = chip(positions, record)
            shown.append(Token("", text, "chip", total, len(positions)))
        else:
            shown += [tokens[position] for position in positions]
    return shown


def _chosen(
    position: int, token: Token, cells: dict[int, str], image: bool
) -> tuple[int | None, Token]:
    """A chosen token with its position, or, where it has one, with its cell's name."""
    if not image:
        return position, token
    named = Token("", cells.get(position, "image token"), token.classes, token.score)
    return None if position in cells else position, named


def _token(text: str, score: float, fits: bool, scale: float, mark: str | None) -> Token:
    inner = text.lstrip(" ") if mark else text
    space = text[: len(text) - len(inner)]
    words = [shade(score, scale, STEPS if fits else _DIM_SHADES), "" if fits else "dim", mark or ""]
    return Token(space, inner, " ".join(filter(None, words)), written(score))


def _reason(record: Record) -> str:
    if record["used"]:
        return ""
    if not record["positive"]:
        return "no eligible token speaks for the chosen answer"
    return "no eligible token speaks for the rejected answer"
