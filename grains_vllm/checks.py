"""Checks of single values, for the YAML and for requests, with messages that name the field."""

import difflib
import heapq
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from grains_vllm.errors import GrainsConfigError
from grains_vllm.positions import ALLOWED, Positions, PositionsError

# Far beyond any useful strength, and small enough that float32 norms cannot overflow.
MAX_STRENGTH = 1e6
_MOST_LISTED, _MOST_COMPARED = 8, 500  # names in a message, and those considered for it


def strength(value: Any, where: str, error: type[ValueError] = GrainsConfigError) -> float:
    """A finite number (no bool) of at most MAX_STRENGTH in size, else `error`."""
    # Written so that NaN fails too, and so that no integer is too long to compare.
    if type(value) not in (int, float) or not abs(value) <= MAX_STRENGTH:
        kind = "a number but text; expected one" if isinstance(value, str) else "a number"
        limits = f"-{MAX_STRENGTH:g} and {MAX_STRENGTH:g}"
        raise error(f"{where}: {short(value)} is not {kind} between {limits}")
    return float(value)


def positions(value: Any, where: str, error: type[ValueError] = GrainsConfigError) -> str:
    """The canonical text of positions, else `error`."""
    if not isinstance(value, str):
        raise error(f"{where}: {short(value)} is not one of {ALLOWED}")
    try:
        return str(Positions.parse(value))
    except PositionsError as problem:
        raise error(f"{where}: {problem}") from None


def integer(
    value: Any,
    low: int,
    high: int,
    where: str,
    error: type[ValueError] = GrainsConfigError,
) -> int:
    """A whole number (no bool) from low to high, else `error`."""
    if type(value) is not int or not low <= value <= high:
        raise error(f"{where}: {short(value)} is not a whole number from {low} to {high}")
    return value


def one_of(
    value: Any, allowed: tuple[str, ...], where: str, error: type[ValueError] = GrainsConfigError
) -> str:
    """One of the allowed words, else `error`, which names them."""
    if value not in allowed:
        raise error(f"{where}: {short(value)} is not one of {', '.join(allowed)}")
    return str(value)


def text(value: Any, where: str, error: type[ValueError] = GrainsConfigError) -> str:
    """Text that every process, file system and client can be told, else `error`."""
    if not isinstance(value, str):
        raise error(f"{where}: {short(value)} is not text")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise error(f"{where}: {short(value)} holds a NUL or half a character (a lone surrogate)")
    return value


def known_keys(data: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    """Raises GrainsConfigError for a key that nobody would read."""
    for key in data:
        if key not in known:
            close = suggestion(key, known) if isinstance(key, str) else ""
            raise GrainsConfigError(
                f"{where}: unknown key {short(key)}{close}; known keys: {', '.join(known)}"
            )


class _Short(reprlib.Repr):
    """Looks at the top of a value only: a nest of aliases may have more parts than atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 20, 20, 6

    def repr_str(self, value: str, level: int) -> str:
        return repr(value[:80])

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if abs(value) < 10**80 else "a huge integer"


_SHORT = _Short()


def short(value: Any) -> str:
    """repr() for messages: somebody else's value, at a length that fits into one."""
    shown = _SHORT.repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def closest(found: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name that is most like `found`, if one is close."""
    return next(iter(_close(found, known, 1, cutoff)), None)


def suggestion(found: str, known: Iterable[str], cutoff: float = 0.75) -> str:
    """' (did you mean X?)' where one of the known names is close."""
    close = closest(found, known, cutoff)
    return f" (did you mean {close!r}?)" if close else ""


def listed(names: Collection[str], near: str = "", prefix: str = "") -> str:
    """The names in order; of many, those most like `near`, and how many more there are.

    Args:
        prefix: stands before each of them.
    """
    if len(names) <= _MOST_LISTED:
        return ", ".join(prefix + name for name in sorted(names))
    # The nearest first; where too few are near at all, others follow in order.
    close = _close(near, names, _MOST_LISTED, 0.5)
    first = heapq.nsmallest(_MOST_LISTED, names)
    shown = [prefix + name for name in dict.fromkeys([*close, *first])][:_MOST_LISTED]
    return f"{', '.join(shown)} and {len(names) - len(shown)} more (GET /v1/models lists them)"


def _close(found: str, known: Iterable[str], count: int, cutoff: float) -> list[str]:
    """The names that are most like `found`; of very many only those that begin like it are looked
    at, since other requests wait for it."""
    names = list(known)
    if len(names) > _MOST_COMPARED:
        names = [name for name in names if name[:2] == found[:2]][:_MOST_COMPARED]
    return difflib.get_close_matches(found[:80], names, n=count, cutoff=cutoff)
