"""Keys that look like ours and are not: who wrote one wanted steering, and would get none."""

import unicodedata
from collections.abc import Iterable

from grains_vllm.checks import closest

_CLOSE = 0.85  # of difflib's ratio: one slip in a word of eight letters


def likeness(key: str, known: Iterable[str], cutoff: float = _CLOSE) -> str | None:
    """Which of the known names `key` is, or could be taken for, by a reader or by its writer.

    Case, separators, white space, accents, full-width forms and invisible characters make no
    difference. A letter of another script stands for any letter, since it may look like one, where
    at least half of the key is ASCII. The last resort is a slip of the keyboard.
    """
    mine = skeleton(key[:128])
    theirs = {skeleton(name): name for name in known}
    if mine in theirs:
        return theirs[mine]
    for letters, name in theirs.items():
        if _looks_like(mine, letters):
            return name
    found = closest(mine, list(theirs), cutoff)
    return theirs[found] if found else None


def skeleton(key: str) -> str:
    """A key's letters and digits alone, without case, accents and typographic variants."""
    # Compatibility forms are decomposed (NFKD), so that accents fall away with all other marks.
    plain = unicodedata.normalize("NFKD", key).casefold()
    return "".join(letter for letter in plain if letter.isalnum())


def _looks_like(mine: str, letters: str) -> bool:
    if len(mine) != len(letters) or mine.isascii():
        return False
    same = [a == b for a, b in zip(mine, letters, strict=True)]
    foreign = [not letter.isascii() for letter in mine]
    return sum(same) * 2 >= len(same) and all(map(max, same, foreign))
