"""Which of a request's tokens are steered: one interval around the place where its prompt ends."""

import re
from dataclasses import dataclass

_PART = re.compile(r"(prompt|generation)(?::([1-9][0-9]{0,8}))?")
ALLOWED = (
    "all, prompt, prompt:N (its last N tokens), generation, generation:N (its first N tokens), or "
    "one of each joined by '+'"
)


class PositionsError(ValueError):
    """A text that names no positions; the message says what is allowed."""


@dataclass(frozen=True)
class Positions:
    """An interval around the end of the prompt.

    Attributes:
        before: how many of the prompt's last tokens are steered; None for all of them.
        after: how many of the first generated tokens are steered; None for all of them.
    """

    before: int | None
    after: int | None

    @classmethod
    def parse(cls, text: object) -> "Positions":
        """Reads `all`, `prompt[:N]`, `generation[:N]` or `prompt[:N]+generation[:N]`.

        Raises:
            PositionsError: anything else.
        """
        if text == "all":
            return cls(None, None)
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
            return "all"
        parts = [("prompt", self.before), ("generation", self.after)]
        return "+".join(
            name if count is None else f"{name}:{count}" for name, count in parts if count != 0
        )

    def interval(self, border: int) -> tuple[int, int | None]:
        """The steered positions of a request whose first `border` tokens are its prompt.

        Returns:
            (start, end): 0-based positions start <= p < end; end is None without a limit.
        """
        start = 0 if self.before is None else max(0, border - self.before)
        return start, None if self.after is None else border + self.after
