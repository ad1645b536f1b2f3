"""Eight steps from no colour to full colour, one hue for each sign."""

STEPS = 8


def shade(score: float, scale: float, steps: int = STEPS) -> str:
    """The class of a score: m1 to m8 above zero, l1 to l8 below it, "" for next to nothing.

    Args:
        scale: the score of the darkest shade; larger ones look the same.
        steps: how many of the shades may be used.
    """
    share = min(1.0, abs(score) / scale) if scale else 0.0
    step = round(share * steps)
    return f"{'m' if score > 0 else 'l'}{step}" if step else ""


def written(score: float) -> str:
    """A score in nats with its sign, four digits."""
    return f"{score:+.4g}"
