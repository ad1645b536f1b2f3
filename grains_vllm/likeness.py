"""Keys that look like ours and are not: who wrote one wanted steering, and would get none."""

import unicodedata
from collections.abc import Mapping
from functools import cache

from grains_vllm.checks import closest

_LONGEST = 64  # characters of a key that are looked at; no name of ours has half as many


def likeness(key: str, known: tuple[str, ...], cutoff: float = 0.85) -> str | None:
    """Which of the known names `key` is, or could be taken for, by a reader or by its writer.

    Case, separators, white space, accents, full-width forms and invisible characters make no
    difference. A letter of another script stands for any letter, since it may look like one, where
    at least half of the key is ASCII. The last resort is a slip of the keyboard.

    Args:
        cutoff: difflib's ratio; the default is one slip in a word of eight letters.
    """
    mine, theirs = skeleton(key), _skeletons(known)
    if mine in theirs:
        return theirs[mine]
    for letters, name in theirs.items():
        if _looks_like(mine, letters):
            return name
    found = closest(mine, theirs, cutoff)
    return theirs[found] if found else None


def skeleton(key: str) -> str:
    """A key's letters and digits alone, without case, accents and typographic variants."""
    # Compatibility forms are decomposed (NFKD), so that accents fall away with all other marks.
    plain = unicodedata.normalize("NFKD", key[:_LONGEST]).casefold()[:_LONGEST]
    return "".join(letter for letter in plain if letter.isalnum())


@cache
def _skeletons(known: tuple[str, ...]) -> Mapping[str, str]:
    return {skeleton(name): name for name in known}


def _looks_like(mine: str, letters: str) -> bool:
    if len(mine) != len(letters) or mine.isascii():
        return False
    same = [a == b for a, b in zip(mine, letters, strict=True)]
    foreign = [not letter.isascii() for letter in mine]
    return sum(same) * 2 >= len(same) and all(map(max, same, foreign))
