"""Scores of prompt tokens: how much each one speaks for y+ against y- (GrAInS, attribution step).

Every method is a weighted sum of gradients of F at some points of embedding space:
integrated gradients (Sundararajan et al., 2017) at Gauss-Legendre nodes between baseline and
input, gradient x input at the input, SmoothGrad (Smilkov et al., 2017) at noisy copies of it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offline.errors import InputError
from offline.model import Decoder
from offline.objective import contrast, may_pack
from offline.options import AttributionMethod, ExtractOptions
from offline.prompts import TokenPair

FIRST_POINTS = 32


@dataclass(frozen=True)
class Attribution:
    """The scores of one prompt.

    Attributes:
        scores: [T] float64, the unit of F (nats); T counts every prompt token.
        f_input, f_baseline: F(x) and F(b).
        points: gradients taken in the final sum.
        gap: |sum of scores - (F(x) - F(b))| / max(|F(x) - F(b)|, 1e-6); None where the method
            does not promise completeness.
        packed: whether both responses shared one row.
    """

    scores: Tensor
    f_input: float
    f_baseline: float
    points: int
    gap: float | None
    packed: bool


@dataclass(frozen=True)
class _Point:
    """One gradient to take: of example `index`, at `place(x)`, weighted."""

    index: int
    place: Callable[[Tensor], Tensor]
    weight: float


class Attributor:
    """Attributes groups of examples; points of all of them share batches of `batch_rows` rows.

    Attributes:
        batch_rows: rows per forward; halved for good when the device runs out of memory.
    """

    def __init__(
        self, decoder: Decoder, options: ExtractOptions, baseline: Tensor, batch_rows: int
    ) -> None:
        self.decoder = decoder
        self.options = options
        self.baseline = baseline
        self.batch_rows = batch_rows

    def attribute(
        self, pairs: Sequence[TokenPair], on_example: Callable[[], None] = lambda: None
    ) -> list[Attribution]:
        """One Attribution per pair, the same (beyond float noise) however pairs are grouped.

        Args:
            on_example: called once for each finished example.

        Raises:
            InputError: F or a gradient is NaN or infinite.
        """
        inputs = [self.decoder.embed(pair.prompt_ids).float() for pair in pairs]
        packed = [may_pack(self.decoder, pair) for pair in pairs]
        ends = [self._ends(*example) for example in zip(pairs, inputs, packed, strict=True)]
        results: list[Attribution | None] = [None] * len(pairs)
        first = self.options.ig_points or min(FIRST_POINTS, self.options.ig_max_points)
        points = dict.fromkeys(range(len(pairs)), first)
        while points:
            scores = self._scores(pairs, inputs, packed, points)
            unfinished = {}
            for index, score in scores.items():
                f_input, f_baseline = ends[index]
                gap = self._gap(score, f_input - f_baseline)
                used = self._count(points[index])
                results[index] = Attribution(score, f_input, f_baseline, used, gap, packed[index])
                if self._wants_more(gap, used):
                    unfinished[index] = min(2 * used, self.options.ig_max_points)
                else:
                    on_example()
            points = unfinished
        return [result for result in results if result is not None]

    def _count(self, points: int) -> int:
        method = self.options.attribution
        if method is AttributionMethod.integrated_gradients:
            return points
        samples = {AttributionMethod.smoothgrad: self.options.smoothgrad_samples}
        return samples.get(method, 0 if method is AttributionMethod.random else 1)

    def _wants_more(self, gap: float | None, used: int) -> bool:
        options = self.options
        if gap is None or options.ig_points is not None:
            return False
        return gap > options.ig_tolerance and used < options.ig_max_points

    def _gap(self, scores: Tensor, change: float) -> float | None:
        if self.options.attribution is not AttributionMethod.integrated_gradients:
            return None
        return abs(float(scores.sum()) - change) / max(abs(change), 1e-6)

    def _scores(
        self, pairs: Sequence[TokenPair], inputs: list[Tensor], packed: list[bool],
        points: dict[int, int],
    ) -> dict[int, Tensor]:  # fmt: skip
        method = self.options.attribution
        if method is AttributionMethod.random:
            return {index: _random_scores(pairs[index], self.options.seed) for index in points}
        sums = {index: torch.zeros_like(inputs[index], dtype=torch.float64) for index in points}
        for one_row in (True, False):
            chosen = [index for index in points if packed[index] is one_row]
            stream = [point for index in chosen for point in self._points(pairs, index, points)]
            self._accumulate(pairs, inputs, stream, one_row, sums)
        for index, total in sums.items():
            self._require_finite(total, pairs[index], "the gradient")
        factors = {
            index: inputs[index] - self.baseline
            if method is AttributionMethod.integrated_gradients
            else inputs[index]
            for index in points
        }
        return {index: (factors[index] * sums[index]).sum(1).cpu() for index in points}

    def _points(
        self, pairs: Sequence[TokenPair], index: int, points: dict[int, int]
    ) -> Iterator[_Point]:
        options = self.options
        if options.attribution is AttributionMethod.integrated_gradients:
            nodes, weights = np.polynomial.legendre.leggauss(points[index])
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                yield _Point(index, _between(self.baseline, float(node)), float(weight))
        elif options.attribution is AttributionMethod.smoothgrad:
            for sample in range(options.smoothgrad_samples):
                seed = _seed(pairs[index], options.seed, sample)
                place = _noisy(seed, options.smoothgrad_noise)
                yield _Point(index, place, 1 / options.smoothgrad_samples)
        else:
            yield _Point(index, lambda x: x, 1.0)

    def _accumulate(
        self, pairs: Sequence[TokenPair], inputs: list[Tensor], stream: list[_Point],
        packed: bool, sums: dict[int, Tensor],
    ) -> None:  # fmt: skip
        done = 0
        while done < len(stream):
            size = max(1, self.batch_rows // (1 if packed else 2))
            batch = stream[done : done + size]
            leaves = [p.place(inputs[p.index]).detach().requires_grad_() for p in batch]
            try:
                values = contrast(
                    self.decoder, [pairs[p.index] for p in batch], leaves, packed,
                    self.options.objective,
                )  # fmt: skip
                gradients = torch.autograd.grad(values.sum(), leaves)
            except torch.OutOfMemoryError:
                self._halve(len(batch))
                continue
            for point, gradient in zip(batch, gradients, strict=True):
                sums[point.index] += point.weight * gradient.double()
            done += len(batch)

    def _ends(self, pair: TokenPair, x: Tensor, packed: bool) -> tuple[float, float]:
        """F(x) and F(b), without gradients."""
        with torch.no_grad():
            values = contrast(
                self.decoder, [pair, pair], [x, self.baseline.expand_as(x)], packed,
                self.options.objective,
            )  # fmt: skip
        self._require_finite(values, pair, "the objective")
        f_input, f_baseline = values.double().tolist()
        return f_input, f_baseline

    def _halve(self, rows: int) -> None:
        if rows == 1:
            raise InputError(
                "the device has too little memory for one row; use shorter prompts, "
                "--dtype bfloat16 or --device-map auto"
            )
        self.batch_rows = max(1, self.batch_rows // 2)
        torch.cuda.empty_cache()

    def _require_finite(self, value: Tensor, pair: TokenPair, what: str) -> None:
        if not torch.isfinite(value).all():
            raise InputError(
                f"{pair.pair.where}: {what} holds a NaN or infinity with model "
                f"'{self.decoder.name}' in {self.decoder.dtype}"
            )


def _seed(pair: TokenPair, seed: int, sample: int = 0) -> int:
    # From the example itself, so that neither order nor grouping changes the draw.
    return random.Random(f"{seed}/{sample}/{pair.pair.fingerprint}").getrandbits(63)


def _random_scores(pair: TokenPair, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(pair, seed))
    return torch.randn(len(pair.prompt_ids), generator=generator, dtype=torch.float64)


def _between(baseline: Tensor, a: float) -> Callable[[Tensor], Tensor]:
    return lambda x: baseline + a * (x - baseline)


def _noisy(seed: int, noise: float) -> Callable[[Tensor], Tensor]:
    """Adds Gaussian noise whose deviation is `noise` times the spread (max - min) of x."""

    def place(x: Tensor) -> Tensor:
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        return x + noise * (x.max() - x.min()) * draw

    return place
