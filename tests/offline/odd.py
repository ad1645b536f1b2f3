"""Documents with one part that is not as it should be."""

from collections.abc import Iterator
from typing import Any

ODD: list[Any] = [
    None, True, -1, 7, float("nan"), float("inf"), 10**400, "x", "7", [], {}, [[]], {"7": 7}
]  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """`value` with one part of it, at any depth, replaced, left out or doubled."""
    yield from ODD
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            yield from ({**value, key: odd} for odd in variants(inner))
    if isinstance(value, list):
        yield value * 2
        for place, inner in enumerate(value):
            yield from ([*value[:place], odd, *value[place + 1 :]] for odd in variants(inner))
