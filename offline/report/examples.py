"""Examples as the page shows them: every prompt token with its shade, mark and score."""

from collections.abc import Sequence
from dataclasses import dataclass

from offline.report.records import Record
from offline.report.text import shortened, visible
from offline.report.tokens import Spelling, readable, spelling

_SHADES = 8
_DIM_SHADES = 4  # template and special tokens are paler: they cannot be chosen


@dataclass(frozen=True)
class Token:
    """A prompt token.

    Attributes:
        space: what stands before the mark of a chosen token.
        text: as a person reads it.
        classes: of its shade (m1 to m8, l1 to l8), mark (plus, minus) and eligibility (dim).
        score: in nats, four digits.
    """

    space: str
    text: str
    classes: str
    score: str


@dataclass(frozen=True)
class Example:
    """One example; `scale` is the score of the darkest shade."""

    id: str
    begins: str
    tokens: list[Token]
    plus: list[tuple[int, Token]]
    minus: list[tuple[int, Token]]
    scale: float
    used: bool
    above: bool
    gap: float | None
    f_input: float | None
    f_baseline: float | None
    points: int | None
    total: float
    reason: str


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
    tokens = [
        _token(text, score, fits, scale, marks.get(position))
        for position, (text, score, fits) in enumerate(zip(texts, scores, eligible, strict=True))
    ]
    content = [text for text, fits in zip(texts, eligible, strict=True) if fits]
    begins = (" " if kind is Spelling.plain else "").join(content).replace("↵", " ")
    return Example(
        id=visible(record["id"]),
        begins=shortened(begins, 90),
        tokens=tokens,
        plus=[(position, tokens[position]) for position in record["positive"]],
        minus=[(position, tokens[position]) for position in record["negative"]],
        scale=scale,
        used=record["used"],
        above=tolerance is not None and record["gap"] is not None and record["gap"] > tolerance,
        gap=record["gap"],
        f_input=record["f_input"],
        f_baseline=record["f_baseline"],
        points=record["points"],
        total=sum(scores),
        reason=_reason(record),
    )


def _token(text: str, score: float, fits: bool, scale: float, mark: str | None) -> Token:
    inner = text.lstrip(" ") if mark else text
    space = text[: len(text) - len(inner)]
    return Token(space, inner, _classes(score, fits, scale, mark), f"{score:+.4g}")


def _classes(score: float, fits: bool, scale: float, mark: str | None) -> str:
    shades = _SHADES if fits else _DIM_SHADES
    share = min(1.0, abs(score) / scale) if scale else 0.0
    shade = round(share * shades)
    words = [f"{'m' if score > 0 else 'l'}{shade}"] if shade else []
    words += [] if fits else ["dim"]
    return " ".join([*words, *([mark] if mark else [])])


def _reason(record: Record) -> str:
    if record["used"]:
        return ""
    if not record["positive"]:
        return "no eligible token speaks for the chosen answer"
    return "no eligible token speaks for the rejected answer"
