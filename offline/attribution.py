"""Scores of prompt tokens: how much each one speaks for y+ against y- (GrAInS, attribution step).

Every method is a weighted sum of gradients of F at some points of embedding space (see points.py),
times the input's distance from where the method starts. Points of all examples form one stream,
which is cut into batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.errors import InputError
from offline.model import Decoder
from offline.objective import contrast, may_pack
from offline.options import AttributionMethod, ExtractOptions
from offline.points import Point, points_of, random_scores
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
        self._packed_length = 0

    def attribute(
        self, pairs: Sequence[TokenPair], on_example: Callable[[], None] = lambda: None
    ) -> list[Attribution]:
        """One Attribution per pair, the same (beyond float noise) however pairs are grouped.

        Args:
            on_example: called once for each finished example.

        Raises:
            InputError: F or a gradient is NaN or infinite.
            torch.OutOfMemoryError: the device is too small for a single row.
        """
        inputs = [self.decoder.embed(pair.prompt_ids).float() for pair in pairs]
        packed = [self._packs(pair) for pair in pairs]
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
            return {index: random_scores(pairs[index], self.options.seed) for index in points}
        sums = {index: torch.zeros_like(inputs[index], dtype=torch.float64) for index in points}
        for one_row in (True, False):
            chosen = [index for index in points if packed[index] is one_row]
            stream = [
                (index, point)
                for index in chosen
                for point in points_of(
                    pairs[index], inputs[index], self.baseline, points[index], self.options
                )
            ]
            self._accumulate(pairs, stream, one_row, sums)
        for index, total in sums.items():
            self._require_finite(total, pairs[index], "the gradient")
        factors = {
            index: inputs[index] - self.baseline
            if method is AttributionMethod.integrated_gradients
            else inputs[index]
            for index in points
        }
        return {index: (factors[index] * sums[index]).sum(1).cpu() for index in points}

    def _accumulate(
        self, pairs: Sequence[TokenPair], stream: list[tuple[int, Point]],
        packed: bool, sums: dict[int, Tensor],
    ) -> None:  # fmt: skip
        done = 0
        while done < len(stream):
            size = max(1, self.batch_rows // (1 if packed else 2))
            batch = stream[done : done + size]
            leaves = [point.place().detach().requires_grad_() for _, point in batch]
            try:
                values = contrast(
                    self.decoder, [pairs[index] for index, _ in batch], leaves, packed,
                    self.options.objective,
                )  # fmt: skip
                gradients = torch.autograd.grad(values.sum(), leaves)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.batch_rows = max(1, self.batch_rows // 2)
                torch.cuda.empty_cache()
                continue
            for (index, point), gradient in zip(batch, gradients, strict=True):
                sums[index] += point.weight * gradient.double()
            done += len(batch)

    def _packs(self, pair: TokenPair) -> bool:
        # What can go wrong belongs to the model or comes with length, so an example that is no
        # longer than one that has been tried needs no trial of its own.
        if pair.length <= self._packed_length:
            return True
        fits = may_pack(self.decoder, pair)
        if fits:
            self._packed_length = pair.length
        return fits

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

    def _require_finite(self, value: Tensor, pair: TokenPair, what: str) -> None:
        if not torch.isfinite(value).all():
            raise InputError(
                f"{pair.pair.where}: {what} holds a NaN or infinity with model "
                f"'{self.decoder.name}' in {self.decoder.dtype}"
            )
