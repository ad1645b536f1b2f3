"""The points of a sweep: vectors x layers x positions x strengths, from how a person says them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from grains_vllm.checks import MAX_STRENGTH
from grains_vllm.positions import Positions, PositionsError
from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.scoring import Point

LAYERS, POSITIONS = "single;all", "all"
STRENGTHS = "0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5,0.6,0.8"
_EXAMPLE = "expected single, all, ranges, ranges:4 or lists such as 8-15,20, with ';' between them"


def grid(
    vectors: Mapping[str, SteeringVector], layers: str, strengths: str, positions: str
) -> list[Point]:
    """The points; what is asked for twice is there once.

    Raises:
        InputError: naming the option.
    """
    values, places = parse_strengths(strengths), parse_positions(positions)
    return [
        Point(name, chosen, strength, place)
        for name, vector in vectors.items()
        for chosen in layer_sets(layers, name, vector)
        for place in places
        for strength in values
    ]


def scaled(points: Sequence[Point], factors: Mapping[str, float]) -> list[Point]:
    """The points, with strengths times the factor of their vector, to two digits.

    Raises:
        InputError: a strength would be larger than servers take.
    """
    found = []
    for point in points:
        strength = point.strength
        if point.vector in factors:
            strength = float(f"{strength * factors[point.vector]:.2g}")
        if abs(strength) > MAX_STRENGTH:
            raise InputError(
                f"'{point.vector}' has so small lengths that useful strengths are above "
                f"{MAX_STRENGTH:g}; make them larger before importing it"
            )
        found.append(replace(point, strength=strength))
    return found


def layer_sets(text: str, name: str, vector: SteeringVector) -> list[tuple[int, ...]]:
    """The sets of layers that `text` means for a vector.

    `single` is every layer by itself, `all` all of them at once, `ranges` the windows of 2, 4, 8,
    ... neighbours, each half a window after the one before; `ranges:W` those of width W.
    """
    usable = [layer for layer in vector.layers if vector.reference_norms[layer] > 0]
    if not usable:
        raise InputError(f"'{name}': every reference norm is 0, so no strength steers")
    sets: list[tuple[int, ...]] = []
    for part in (part.strip() for part in text.split(";")):
        width = re.fullmatch(r"ranges(?::([0-9]{1,9}))?", part)
        if part == "single":
            sets += [(layer,) for layer in usable]
        elif part == "all":
            sets.append(tuple(usable))
        elif width is not None:
            sets += _ranges(usable, width[1], text)
        else:
            sets.append(_listed(part, text, name, usable))
    return list(dict.fromkeys(sets))


def _ranges(usable: Sequence[int], width: str | None, text: str) -> list[tuple[int, ...]]:
    widths = [2**n for n in range(1, len(usable).bit_length()) if 2**n < len(usable)]
    if width is not None:
        widths = [int(width)]
        if not 1 <= widths[0] <= len(usable):
            raise InputError(
                f"--layers is '{text}', but windows of 1 to {len(usable)} are possible"
            )
    return [
        tuple(usable[start : start + size])
        for size in widths
        for start in range(0, len(usable) - size + 1, max(size // 2, 1))
    ]


def _listed(part: str, text: str, name: str, usable: Sequence[int]) -> tuple[int, ...]:
    chosen: set[int] = set()
    for piece in part.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", piece.strip())
        if match is None:
            raise InputError(f"--layers is '{text}', {_EXAMPLE}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"--layers is '{text}': {piece.strip()} runs backwards")
        chosen.update(range(first, last + 1))
    missing = sorted(chosen - set(usable))
    if missing:
        raise InputError(f"--layers is '{text}', but '{name}' steers {usable}, not {missing}")
    return tuple(sorted(chosen))


def parse_strengths(text: str) -> list[float]:
    """Reads `0.1,0.2`; negative ones steer the other way, 0 is no steering."""
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not abs(value) <= MAX_STRENGTH:
            raise InputError(
                f"--strengths is '{text}', expected numbers such as 0.1,0.2, of at most "
                f"{MAX_STRENGTH:g} in size"
            )
        values.append(value + 0.0)  # -0 is 0
    return list(dict.fromkeys(values))


def parse_positions(text: str) -> list[str]:
    """Reads positions with commas between them, such as `all,prompt:1+generation`."""
    places = []
    for part in text.split(","):
        try:
            places.append(str(Positions.parse(part.strip())))
        except PositionsError as error:
            raise InputError(f"--positions is '{text}': {error}") from None
    return list(dict.fromkeys(places))
