"""Which prompt tokens are masked: T+ speaks most for y+, T- for y- (GrAInS, selection step)."""

from collections.abc import Sequence

from torch import Tensor


def select(scores: Tensor, eligible: Sequence[bool], k: int) -> tuple[list[int], list[int]]:
    """The positions of T+ and T-, strongest first.

    Args:
        scores: [T], the sign says for which response a token speaks.
        eligible: T flags; other tokens are never selected.
        k: at most so many per set; a set holds only tokens of its own sign and may be empty.
    """
    values = scores.tolist()
    ranked = sorted((i for i, flag in enumerate(eligible) if flag), key=lambda i: -values[i])
    positive = [i for i in ranked if values[i] > 0]
    negative = [i for i in reversed(ranked) if values[i] < 0]
    return positive[:k], negative[:k]
