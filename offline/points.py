"""Where each attribution method takes gradients, and with what weights.

Integrated gradients (Sundararajan et al., 2017): nodes between baseline and input, rule after rule
(see quadrature.py); gradient x input: the input; SmoothGrad (Smilkov et al., 2017): noisy copies.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.options import AttributionMethod, ExtractOptions
from offline.prompts import TokenPair
from offline.quadrature import ladder

Place = Callable[[], Tensor]


@dataclass(frozen=True)
class Stage:
    """One attempt at the scores: gradients to take, and how to weigh all that are then there.

    Attributes:
        places: where new gradients are taken; each gives embeddings [T, hidden].
        kept: how many gradients of the stage before are used again, its first ones.
        weights: of the kept and the new ones, in this order.
    """

    places: list[Place]
    kept: int
    weights: tuple[float, ...]


def stages(pair: TokenPair, x: Tensor, baseline: Tensor, options: ExtractOptions) -> list[Stage]:
    """The attempts for one example, in order; only integrated gradients may need a second one.

    Args:
        x: the prompt's embeddings [T, hidden] float32; `baseline` is [hidden] or [T, hidden].
    """
    if options.attribution is AttributionMethod.integrated_gradients:
        return [
            Stage([_between(baseline, x, node) for node in r.nodes[r.kept :]], r.kept, r.weights)
            for r in ladder(options.ig_points, options.ig_max_points)
        ]
    if options.attribution is AttributionMethod.smoothgrad:
        count = options.smoothgrad_samples
        seeds = [_seed(pair, options.seed, sample) for sample in range(count)]
        noise = options.smoothgrad_noise
        return [Stage([_noisy(x, noise, seed) for seed in seeds], 0, (1 / count,) * count)]
    return [Stage([lambda: x], 0, (1.0,))]


def random_scores(pair: TokenPair, seed: int) -> Tensor:
    """Standard normal scores [T] float64: the ablation that masks random tokens."""
    generator = torch.Generator().manual_seed(_seed(pair, seed))
    return torch.randn(len(pair.prompt_ids), generator=generator, dtype=torch.float64)


def _between(baseline: Tensor, x: Tensor, a: float) -> Place:
    return lambda: baseline + a * (x - baseline)


def _noisy(x: Tensor, noise: float, seed: int) -> Place:
    """Adds Gaussian noise whose deviation is `noise` times the spread (max - min) of x."""

    def place() -> Tensor:
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        return x + noise * (x.max() - x.min()) * draw

    return place


def _seed(pair: TokenPair, seed: int, sample: int = 0) -> int:
    # From the example itself, so that neither order nor grouping changes the draw.
    return random.Random(f"{seed}/{sample}/{pair.pair.fingerprint}").getrandbits(63)
