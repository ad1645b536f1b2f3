"""Where each attribution method takes gradients, and with what weights.

Integrated gradients (Sundararajan et al., 2017): Gauss-Legendre nodes between baseline and input;
gradient x input: the input; SmoothGrad (Smilkov et al., 2017): noisy copies of the input.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from offline.options import AttributionMethod, ExtractOptions
from offline.prompts import TokenPair


@dataclass(frozen=True)
class Point:
    """One gradient to take, at `place()` [T, hidden], weighted."""

    place: Callable[[], Tensor]
    weight: float


def points_of(
    pair: TokenPair, x: Tensor, baseline: Tensor, count: int, options: ExtractOptions
) -> Iterator[Point]:
    """The points of one example; their weights add up to 1.

    Args:
        x: the prompt's embeddings [T, hidden] float32; `baseline` is [hidden].
        count: number of integration points; other methods have numbers of their own.
    """
    if options.attribution is AttributionMethod.integrated_gradients:
        for node, weight in zip(*_gauss_legendre(count), strict=True):
            yield Point(_between(baseline, x, node), weight)
    elif options.attribution is AttributionMethod.smoothgrad:
        for sample in range(options.smoothgrad_samples):
            place = _noisy(x, options.smoothgrad_noise, _seed(pair, options.seed, sample))
            yield Point(place, 1 / options.smoothgrad_samples)
    else:
        yield Point(lambda: x, 1.0)


def random_scores(pair: TokenPair, seed: int) -> Tensor:
    """Standard normal scores [T] float64: the ablation that masks random tokens."""
    generator = torch.Generator().manual_seed(_seed(pair, seed))
    return torch.randn(len(pair.prompt_ids), generator=generator, dtype=torch.float64)


@lru_cache
def _gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _between(baseline: Tensor, x: Tensor, a: float) -> Callable[[], Tensor]:
    return lambda: baseline + a * (x - baseline)


def _noisy(x: Tensor, noise: float, seed: int) -> Callable[[], Tensor]:
    """Adds Gaussian noise whose deviation is `noise` times the spread (max - min) of x."""

    def place() -> Tensor:
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        return x + noise * (x.max() - x.min()) * draw

    return place


def _seed(pair: TokenPair, seed: int, sample: int = 0) -> int:
    # From the example itself, so that neither order nor grouping changes the draw.
    return random.Random(f"{seed}/{sample}/{pair.pair.fingerprint}").getrandbits(63)
