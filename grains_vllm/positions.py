"""Which of a request's tokens are steered: around the end of its prompt, or by what they hold."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PART = re.compile(r"(prompt|generation)(?::([1-9][0-9]{0,8}))?")
# By what a token holds; for them the end of the prompt does not matter.
TEXT, IMAGE = "text", "image"
ALLOWED = (
    "all, text, image, prompt, prompt:N (its last N tokens), generation, generation:N (its first N "
    "tokens), or a prompt and a generation joined by '+'"
)
# Positions start <= p < end, 0-based; end is None without a limit.
Span = tuple[int, int | None]


class PositionsError(ValueError):
    """A text that names no positions; the message says what is allowed."""


@dataclass(frozen=True)
class Positions:
    """An interval around the end of the prompt, or the tokens of one kind in the whole request.

    Attributes:
        before: how many of the prompt's last tokens are steered; None for all of them.
        after: how many of the first generated tokens are steered; None for all of them.
        only: TEXT or IMAGE, of which `before` and `after` are None; "" for tokens of both kinds.
    """

    before: int | None
    after: int | None
    only: str = ""

    @classmethod
    def parse(cls, text: object) -> "Positions":
        """Reads `all`, `text`, `image`, or `prompt[:N]`, `generation[:N]` and their sum.

        Raises:
            PositionsError: anything else.
        """
        if text == "all":
            return cls(None, None)
        if isinstance(text, str) and text in (TEXT, IMAGE):
            return cls(None, None, text)
        found: dict[str, int | None] = {}
        for part in text.split("+") if isinstance(text, str) else [""]:
            match = _PART.fullmatch(part)
            if match is None or match[1] in found:
                shown = repr(text) if len(repr(text)) <= 80 else f"{repr(text)[:77]}..."
                raise PositionsError(f"{shown} is not one of {ALLOWED}")
            found[match[1]] = int(match[2]) if match[2] else None
        return cls(found.get("prompt", 0), found.get("generation", 0))

    def __str__(self) -> str:
        """The canonical text; `parse` reads it back."""
        if (self.before, self.after) == (None, None):
            return self.only or "all"
        parts = [("prompt", self.before), ("generation", self.after)]
        return "+".join(
            name if count is None else f"{name}:{count}" for name, count in parts if count != 0
        )

    @property
    def needs_border(self) -> bool:
        """Whether it matters where the prompt ends."""
        return (self.before, self.after) != (None, None)

    def spans(self, border: int, held: Iterable[tuple[str, int, int]] = ()) -> list[Span]:
        """The steered positions of a request whose first `border` tokens are its prompt.

        Args:
            held: what else than text prompt tokens hold: (modality, start, end), disjoint.

        Returns:
            Disjoint spans in order, none of them empty, no two of them touching.
        """
        if not self.only:
            start = 0 if self.before is None else max(0, border - self.before)
            end = None if self.after is None else border + self.after
            return [(start, end)] if end is None or start < end else []
        if self.only == IMAGE:
            return [*_joined((first, last) for kind, first, last in held if kind == IMAGE)]
        edge, between = 0, []
        for first, last in _joined((first, last) for _, first, last in held):
            if first > edge:
                between.append((edge, first))
            edge = last
        return [*between, (edge, None)]


def _joined(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint pieces in order; those that touch become one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(pieces):
        if found and found[-1][1] == start:
            start = found.pop()[0]
        if start < end:
            found.append((start, end))
    return found
