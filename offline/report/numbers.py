"""Numbers as the page writes them."""

_MINUS = "\N{MINUS SIGN}"


def number(value: float | None, sign: str = "") -> str:
    """Three decimals where that says enough, with a real minus; a dash for nothing."""
    if value is None:
        return "\N{EN DASH}"
    size, sign = abs(value), sign if value else ""
    if size and (size < 0.001 or size >= 1e6):
        text = f"{value:{sign}.2g}"
    else:
        text = f"{value:{sign}.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return text.replace("-", _MINUS)


def signed(value: float | None) -> str:
    """The same with its sign."""
    return number(value, "+")


def whole(value: float | None) -> str:
    """Without decimals where it has none."""
    return "\N{EN DASH}" if value is None else f"{value:g}" if value % 1 else f"{value:.0f}"


def strength(value: float) -> str:
    """As short as it can be, with a real minus."""
    return f"{value:g}".replace("-", _MINUS)
