"""Somebody else's text, made fit to be shown: what cannot be seen gets a visible name."""

import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # part of how some scripts and emoji are written


def visible(text: Any) -> str:
    """`text` with control, bidirectional and other invisible characters named, such as ⟨U+202E⟩.

    Half characters (lone surrogates) are named too: no file could hold them.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def shortened(text: Any, longest: int) -> str:
    """The beginning of `text` in one visible line."""
    line = visible(" ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _shown(character: str) -> str:
    is_space = unicodedata.category(character) == "Zs"
    if character.isprintable() or is_space or character in _JOINERS:
        return character
    return f"⟨U+{ord(character):04X}⟩"
