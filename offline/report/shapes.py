"""What the fields of a result file must hold, said as an example would, and checked."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from offline.errors import InputError

TEXT, NUMBER, WHOLE, FLAG = "text", "a number", "a whole number", "true or false"
_FITS = {
    TEXT: lambda value: type(value) is str,
    # Written so that no integer is too long to become a float.
    NUMBER: lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    WHOLE: lambda value: type(value) is int and abs(value) <= sys.float_info.max,
    FLAG: lambda value: type(value) is bool,
}
Shape = Any


class Maybe:
    """The shape, or null."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape


class Each:
    """An object whose every value has the shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape


def require(value: Any, shape: Shape, where: str, field: str = "") -> None:
    """Raises InputError, naming place and field, unless `value` has the shape.

    A shape is TEXT, NUMBER, WHOLE or FLAG; {field: shape}, of which none may be missing while
    others may be there; [shape] for a list; Maybe(shape) or Each(shape).
    """
    if isinstance(shape, Maybe):
        if value is not None:
            require(value, shape.shape, where, field)
    elif isinstance(shape, Each):
        _expect(isinstance(value, Mapping), value, "an object", where, field)
        for name, item in value.items():
            require(item, shape.shape, where, f"{field}.{name}".lstrip("."))
    elif isinstance(shape, dict):
        _expect(isinstance(value, Mapping), value, "an object", where, field)
        for name, inner in shape.items():
            path = f"{field}.{name}".lstrip(".")
            if name not in value:
                raise InputError(f"{where}: '{path}' is missing")
            require(value[name], inner, where, path)
    elif isinstance(shape, list):
        _expect(isinstance(value, list), value, "a list", where, field)
        for number, item in enumerate(value):
            require(item, shape[0], where, f"{field}[{number}]")
    else:
        _expect(_FITS[shape](value), value, shape, where, field)


def parse(text: str, where: str) -> Any:
    """Strict JSON: no NaN, no infinity.

    Raises:
        InputError: it is not.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error


def _expect(fits: bool, value: Any, expected: str, where: str, field: str) -> None:
    if not fits:
        found = json.dumps(value, default=str)
        found = found if len(found) <= 60 else found[:57] + "..."
        raise InputError(f"{where}: '{field or 'it'}' is {found}, expected {expected}")


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
