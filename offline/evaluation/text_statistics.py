"""What steering may do to the form of answers: repetition and length."""

import re

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return _WORD.findall(text.casefold())


def distinct(text: str, n: int) -> float:
    """distinct-n of one answer: its different n-grams as a share of its n-grams.

    1 where nothing is said twice (so also for an answer of fewer than n words), near 0 in a loop.
    Of each answer, not of all answers together: the latter falls with the number of answers.
    """
    found = words(text)
    grams = [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
