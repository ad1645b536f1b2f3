"""The one way this package changes vLLM: named attributes of classes and modules, wrapped."""

from collections.abc import Callable
from typing import Any

_ABSENT = object()
_undo: list[tuple[Any, str, Any]] = []


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replaces `owner.name` by `make(original)`.

    `original` is the plain function, also where the class holds a static or class method, and None
    where it has no such attribute; the replacement is stored as the same kind of attribute.
    """
    raw = owner.__dict__.get(name, _ABSENT)
    original = getattr(owner, name, None) if raw is _ABSENT else getattr(raw, "__func__", raw)
    replacement = make(original)
    if isinstance(raw, staticmethod | classmethod):
        replacement = type(raw)(replacement)
    _undo.append((owner, name, raw))
    setattr(owner, name, replacement)


def unpatch() -> None:
    """Puts every wrapped attribute back, last one first."""
    while _undo:
        owner, name, raw = _undo.pop()
        if raw is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, raw)
