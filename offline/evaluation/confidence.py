"""How sure a figure is: bootstrap intervals, paired where two settings answered the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_DRAWN = 4_000_000  # numbers in memory at once


@dataclass(frozen=True)
class Figure:
    """One figure with what it is made of, per item, in an order that all settings share.

    Attributes:
        totals: per item what is summed up, such as 0 or 1 for a wrong or right answer.
        weights: per item how much of it there is; the figure is sum(totals) / sum(weights). None
            counts every item once, which makes it a mean.
        perplexity: totals are log-likelihoods and weights tokens; the figure is exp(-sum / sum).
    """

    totals: Sequence[float]
    weights: Sequence[float] | None = None
    perplexity: bool = False


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; low and high are None where one item says nothing about it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap over items: the same draws for every figure, so it repeats exactly."""

    confidence: float = 0.95
    resamples: int = 5000
    seed: int = 0

    def estimate(self, figure: Figure) -> Estimate:
        """The figure itself."""
        return self._bootstrap(_columns(figure), lambda *data: _value(figure, *data))

    def difference(self, figure: Figure, base: Figure) -> Estimate:
        """figure - base, items drawn in pairs; both hold the same items in the same order."""
        if len(figure.totals) != len(base.totals):
            raise ValueError(f"{len(figure.totals)} items against {len(base.totals)}")

        def statistic(a: Any, b: Any, c: Any, d: Any, axis: int = -1) -> Any:
            return _value(figure, a, b, axis) - _value(base, c, d, axis)

        return self._bootstrap((*_columns(figure), *_columns(base)), statistic)

    def _bootstrap(self, columns: tuple[Any, ...], statistic: Any) -> Estimate:
        value = float(statistic(*columns, -1))
        count = len(columns[0])
        if count < 2:
            return Estimate(value, None, None)
        from scipy.stats import bootstrap

        found = bootstrap(
            columns,
            lambda *data, axis=-1: statistic(*data, axis),
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=self.confidence,
            n_resamples=self.resamples,
            batch=max(1, MOST_DRAWN // (count * len(columns))),
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
        if not (math.isfinite(low) and math.isfinite(high)):
            return Estimate(value, None, None)
        return Estimate(value, low, high)


def _columns(figure: Figure) -> tuple[Any, Any]:
    totals = np.asarray(figure.totals, dtype=np.float64)
    weights = np.ones(len(totals)) if figure.weights is None else np.asarray(figure.weights, float)
    return totals, weights


def _value(figure: Figure, totals: Any, weights: Any, axis: int = -1) -> Any:
    mean = totals.sum(axis=axis) / weights.sum(axis=axis)
    return np.exp(-mean) if figure.perplexity else mean
