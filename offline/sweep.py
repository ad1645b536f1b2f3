"""Choosing how to steer: every point is measured, and the best that keeps the limits is taken."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.scoring import ItemScore, Measures, Point, Scorer, Suite, measure

METRICS = ("accuracy", "exact", "margin")
Result = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Which side effects a point may have; None does not ask.

    Attributes:
        min_controls: the least share of controls with the right answer.
        max_perplexity_increase: relative to the model without steering; 0.03 is 3%.
    """

    min_controls: float | None = None
    max_perplexity_increase: float | None = None

    def allow(self, found: Measures, base: Measures) -> bool:
        """Whether `found` keeps the limits."""
        if self.min_controls is not None:
            if found.controls is None:
                raise ValueError("min_controls is given, but the suite has no controls")
            if found.controls < self.min_controls:
                return False
        if self.max_perplexity_increase is not None:
            if found.perplexity is None or base.perplexity is None:
                raise ValueError("max_perplexity_increase is given, but the suite has no texts")
            return found.perplexity <= base.perplexity * (1 + self.max_perplexity_increase)
        return True


def sweep(
    scorer: Scorer,
    suite: Suite,
    points: Sequence[Point],
    metric: str = "accuracy",
    limits: Limits | None = None,
    on_point: Callable[[int | None, Measures], None] = lambda index, found: None,
    done: Mapping[int | None, Measures] | None = None,
) -> Result:
    """Measures the model without steering and every point, and chooses.

    Args:
        metric: one of METRICS, higher is better.
        on_point: told of every point as it is finished; None is the model without steering.
        done: what an earlier run has found, by the same indices; not measured again.

    Returns:
        The part of a "grains-sweep" document that follows from these arguments: metric, limits,
        base, points and chosen (an index into points, None if no point is allowed).

    Raises:
        InputError: no points, an unknown metric, or log-likelihoods that are not finite.
    """
    if not points:
        raise InputError("there is no point to measure")
    if metric not in METRICS:
        raise InputError(f"metric is '{metric}', expected one of {', '.join(METRICS)}")
    limits = limits or Limits()
    found: dict[int | None, Measures] = dict(done or {})
    indices: list[int | None] = [None, *range(len(points))]
    missing = [index for index in indices if index not in found]
    asked = [None if index is None else points[index] for index in missing]
    if missing:
        for number, scores in scorer.score(suite.items, asked):
            _require_finite(scores, asked[number])
            index = missing[number]
            found[index] = measure(suite, scores)
            on_point(index, found[index])
    base, measured = found[None], [found[index] for index in range(len(points))]
    allowed = [limits.allow(measures, base) for measures in measured]
    return {
        "metric": metric,
        "limits": asdict(limits),
        "base": asdict(base),
        "points": [
            {**asdict(point), "layers": list(point.layers), **asdict(measures), "allowed": keeps}
            for point, measures, keeps in zip(points, measured, allowed, strict=True)
        ],
        "chosen": choose(points, measured, allowed, metric),
    }


def choose(
    points: Sequence[Point], measured: Sequence[Measures], allowed: Sequence[bool], metric: str
) -> int | None:
    """The index of the best allowed point, or None.

    Of equals the one with the larger margin, then the smaller strength, then fewer layers, then the
    first.
    """

    def rank(index: int) -> tuple[float, float, float, int]:
        found, point = measured[index], points[index]
        return getattr(found, metric), found.margin, -abs(point.strength), -len(point.layers)

    return max((index for index, keeps in enumerate(allowed) if keeps), key=rank, default=None)


def recommend(vector: SteeringVector, result: Result, about: Mapping[str, Any]) -> SteeringVector:
    """`vector` with the chosen point in its passport, and `about` as the summary of the sweep."""
    point = result["points"][result["chosen"]]
    measures = list(result["base"])
    recommended = {
        "layers": point["layers"],
        "strength": point["strength"],
        "positions": point["positions"],
        "source": "grains sweep",
        "metric": result["metric"],
        "scores": {name: point[name] for name in measures},
        "base": result["base"],
    }
    return replace(
        vector, passport={**vector.passport, "recommended": recommended, "sweep": dict(about)}
    )


def _require_finite(scores: Sequence[ItemScore], point: Point | None) -> None:
    bad = [index for index, score in enumerate(scores) if not math.isfinite(score.logp)]
    if bad:
        where = "without steering" if point is None else f"at {point}"
        raise InputError(
            f"{where}: {len(bad)} of {len(scores)} log-likelihoods are not finite (item {bad[0]} "
            "first); the model's logits hold a NaN or infinity"
        )
