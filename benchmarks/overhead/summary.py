"""Ratios to plain, each within its own round, and what they say about the targets."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.overhead.arms import ARMS, PLAIN
from benchmarks.overhead.record import Key, measurements

CONFIDENCE = 0.95
# Less is better in all of them.
METRICS = {
    "per_token_ms": "time per output token",
    "ttft_ms": "time to first token",
    # Of all the engine's processes: what others do on the machine disturbs it least.
    "processor_ms": "processor time per output token",
}
# The largest ratio to plain that we want.
TARGETS = {
    "per_token_ms": {
        "idle": 1.01, "one": 1.03, "16": 1.03, "generation": 1.03,
        "256": 1.10, "256 vectors": 1.10,
    },
    "ttft_ms": dict.fromkeys(("idle", "one", "16", "generation", "256", "256 vectors"), 1.02),
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One arm's figures for one bench, size and metric.

    Attributes:
        values: ms, one per round that was measured.
        ratios: to plain in the same round, of rounds where both are above 0.
        low, high: a 95% t interval of the ratios' geometric mean, None with fewer than two rounds.
        target: the largest ratio that we want, if there is one.
    """

    bench: str
    size: int
    arm: str
    metric: str
    values: tuple[float, ...]
    ratios: tuple[float, ...]
    low: float | None
    high: float | None
    target: float | None

    @property
    def median_ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> str:
        """met, missed, or undecided where the interval holds the target; "" without a target."""
        if self.target is None:
            return ""
        if self.low is None or self.high is None or self.low <= self.target < self.high:
            return "undecided"
        return "met" if self.high <= self.target else "missed"

    def to_json(self) -> dict[str, Any]:
        rounded = {"low": self.low, "high": self.high, "ratio": self.median_ratio}
        return {
            "bench": self.bench,
            "size": self.size,
            "arm": self.arm,
            "metric": self.metric,
            "rounds": len(self.ratios),
            "median": round(statistics.median(self.values), 4) if self.values else None,
            "ratios": [round(ratio, 4) for ratio in self.ratios],
            **{k: None if v is None else round(v, 4) for k, v in rounded.items()},
            "target": self.target,
            "verdict": self.verdict,
        }


def lines(document: Mapping[str, Any]) -> list[Line]:
    """All comparisons that a record allows, in the order bench, size, metric, arm."""
    found = measurements(document)
    places = sorted({(key.bench, key.size) for key in found})
    made = (
        _line(found, bench, size, arm, metric)
        for bench, size in places
        for metric in METRICS
        for arm in ARMS
    )
    return [line for line in made if line is not None]


def _line(
    found: Mapping[Key, Mapping[str, Any]], bench: str, size: int, arm: str, metric: str
) -> Line | None:
    """None where there is no such figure; a round where it is 0 or no number has no ratio."""
    values, ratios, asked = [], [], False
    for key, figures in sorted(found.items()):
        plain = found.get(Key(bench, size, key.round, PLAIN))
        if (key.bench, key.size, key.arm) == (bench, size, arm) and plain and metric in figures:
            asked = True
            if figures[metric] is not None:
                values.append(figures[metric])
            if figures[metric] and plain.get(metric):
                ratios.append(figures[metric] / plain[metric])
    if not asked:
        return None
    low, high = (None, None) if arm == PLAIN else interval(ratios)
    target = TARGETS.get(metric, {}).get(arm)
    return Line(bench, size, arm, metric, tuple(values), tuple(ratios), low, high, target)


def interval(ratios: Sequence[float]) -> tuple[float | None, float | None]:
    """A t interval of the geometric mean; (None, None) for fewer than two ratios."""
    from scipy import stats

    if len(ratios) < 2:
        return None, None
    logs = [math.log(ratio) for ratio in ratios]
    centre, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * error
    return math.exp(centre - reach), math.exp(centre + reach)


def unmet(found: Iterable[Line]) -> list[Line]:
    """The lines that miss their target for sure."""
    return [line for line in found if line.verdict == "missed"]
