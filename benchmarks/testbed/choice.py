"""Which point a method is reported at: the same grid, limits and rule for all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offline.scoring import Measures, Point, Scorer, Suite, measure
from offline.sweep import Limits, choose, sweep

STRENGTHS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)
COARSE = (0.1, 0.25, 0.6)  # what random draws start with
LIMITS = Limits(min_controls=0.95, max_perplexity_increase=0.03)


@dataclass(frozen=True)
class Choice:
    """What validation chose.

    Attributes:
        point: within the limits; None if none is.
        free: whatever the side effects.
        validation: what validation measured at `point` and at `free`.
    """

    point: Point | None
    free: Point
    validation: tuple[Measures | None, Measures]


def layer_sets(layers: int) -> list[tuple[int, ...]]:
    """Every single layer, neighbours from layer 1 on, and all."""
    sets: list[tuple[int, ...]] = [(layer,) for layer in range(layers)]
    sets += [(layer, layer + 1) for layer in range(1, layers - 1)]
    return list(dict.fromkeys([*sets, tuple(range(layers))]))


def grid(vector: str, layers: int, strengths: Sequence[float] = STRENGTHS) -> list[Point]:
    """Every layer set at every strength, all positions steered."""
    return [Point(vector, chosen, value) for chosen in layer_sets(layers) for value in strengths]


def choose_point(
    scorer: Scorer, suite: Suite, vector: str, layers: int, metric: str, coarse: bool = False
) -> Choice:
    """Measures every point of the grid and takes the best.

    Args:
        coarse: only the COARSE strengths first, then the neighbours in STRENGTHS of the two best;
            for methods of many draws.
    """
    points = grid(vector, layers, COARSE if coarse else STRENGTHS)
    result = sweep(scorer, suite, points, metric, LIMITS)
    choice = _choice(points, result, metric)
    if not coarse:
        return choice
    near = neighbours(choice.free) + ([] if choice.point is None else neighbours(choice.point))
    fine = list(dict.fromkeys([*points, *near]))
    done: dict[int | None, Measures] = {None: Measures(**result["base"])}
    done |= {index: _measures(row) for index, row in enumerate(result["points"])}
    return _choice(fine, sweep(scorer, suite, fine, metric, LIMITS, done=done), metric)


def neighbours(point: Point) -> list[Point]:
    """The points with the next smaller and the next larger strength."""
    at = STRENGTHS.index(point.strength)
    values = (*STRENGTHS[max(at - 1, 0) : at], *STRENGTHS[at + 1 : at + 2])
    return [replace(point, strength=value) for value in values]


def _choice(points: Sequence[Point], result: dict[str, Any], metric: str) -> Choice:
    found = [_measures(row) for row in result["points"]]
    kept = result["chosen"]
    free = choose(points, found, [True] * len(points), metric)
    assert free is not None  # There are points.
    best = None if kept is None else found[kept]
    return Choice(None if kept is None else points[kept], points[free], (best, found[free]))


def measured(scorer: Scorer, suite: Suite, points: Sequence[Point | None]) -> list[Measures]:
    """What comes out at each point."""
    found = {index: measure(suite, scores) for index, scores in scorer.score(suite.items, points)}
    return [found[index] for index in range(len(points))]


def point_json(point: Point | None) -> dict[str, Any] | None:
    """JSON-able; the vector's name is not part of it."""
    if point is None:
        return None
    return {"layers": list(point.layers), "strength": point.strength, "positions": point.positions}


def point_of(found: dict[str, Any] | None, vector: str) -> Point | None:
    """The inverse of `point_json`, for the vector of that name."""
    if found is None:
        return None
    return Point(vector, tuple(found["layers"]), found["strength"], found["positions"])


def _measures(row: dict[str, Any]) -> Measures:
    return Measures(**{name: row[name] for name in Measures.__dataclass_fields__})


def measures_json(measures: Measures | None) -> dict[str, Any] | None:
    return None if measures is None else asdict(measures)
