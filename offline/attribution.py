"""Scores of prompt tokens: how much each one speaks for y+ against y- (GrAInS, attribution step).

Every method is a weighted sum of gradients of F at some points of embedding space (see points.py),
times the input's distance from where the method starts. Points of all examples form one stream,
which is cut into batches.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offline.baselines import prompt_baseline
from offline.batching import Room, out_of_memory, return_freed_memory
from offline.blocks import recomputed
from offline.errors import InputError
from offline.model import Decoder
from offline.objective import contrast, may_pack, row_length
from offline.options import AttributionMethod, ExtractOptions
from offline.points import Place, Stage, random_scores, stages
from offline.prompt_inputs import prompt_inputs
from offline.prompts import TokenPair


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


@dataclass
class Example:
    """One pair on its way.

    Attributes:
        distance: from where the method starts to the input, [T, hidden].
        attempts: the stages it may take; `stage` is the current one.
        products: per gradient taken so far, gradient * distance summed over hidden, [T] float64,
            on the model's device: fetching each one would make the device wait.
    """

    pair: TokenPair
    distance: Tensor
    packed: bool
    f_input: float
    f_baseline: float
    attempts: list[Stage]
    stage: int = 0
    products: list[Tensor] = field(default_factory=list)
    result: Attribution | None = None

    @property
    def attempt(self) -> Stage:
        return self.attempts[self.stage]


class Attributor:
    """Attributes groups of examples; points of all of them share batches.

    Attributes:
        baseline: [hidden] float32; prompts with an image get one of their own from it.
        room: how much goes into one forward.
    """

    def __init__(
        self, decoder: Decoder, options: ExtractOptions, baseline: Tensor, room: Room
    ) -> None:
        self.decoder = decoder
        self.options = options
        self.baseline = baseline
        self.room = room

    def attribute(self, pairs: Sequence[TokenPair]) -> list[Attribution]:
        """One Attribution per pair, the same (beyond float noise) however pairs are grouped.

        Raises:
            InputError: F or a gradient is NaN or infinite.
            RuntimeError: among others, the device is too small for a single row; see
                `out_of_memory`.
        """
        examples = [self._example(pair) for pair in pairs]
        pending = examples
        while pending:
            self.take_gradients(pending)
            unfinished = []
            for example in pending:
                example.result = self.attribution(example)
                if self._wants_more(example):
                    example.stage += 1
                    unfinished.append(example)
            pending = unfinished
        return [example.result for example in examples if example.result is not None]

    def _example(self, pair: TokenPair) -> Example:
        prompt = prompt_inputs(self.decoder, pair.prompt_ids, pair.image)
        x = prompt.embeds.float()
        baseline = prompt_baseline(prompt, self.baseline, self.options.baseline)
        packed = may_pack(self.decoder, pair)
        with torch.no_grad():
            values = contrast(
                self.decoder, [pair, pair], [x, baseline.expand_as(x)], packed,
                self.options.objective,
            )  # fmt: skip
        self._require_finite(values, pair, "the objective")
        f_input, f_baseline = values.double().tolist()
        attempts = stages(pair, x, baseline, self.options)
        start = baseline if self._integrates else torch.zeros_like(baseline)
        return Example(pair, x - start, packed, f_input, f_baseline, attempts)

    @property
    def _integrates(self) -> bool:
        return self.options.attribution is AttributionMethod.integrated_gradients

    def attribution(self, example: Example) -> Attribution:
        """What the gradients taken so far say."""
        if self.options.attribution is AttributionMethod.random:
            scores, used = random_scores(example.pair, self.options.seed), 0
        else:
            weights = torch.tensor(example.attempt.weights, dtype=torch.float64)
            products = torch.stack(example.products).cpu()
            self._require_finite(products, example.pair, "the gradient")
            scores, used = weights @ products, len(weights)
        gap = None
        if self._integrates:
            change = example.f_input - example.f_baseline
            gap = abs(float(scores.sum()) - change) / max(abs(change), 1e-6)
        ends = example.f_input, example.f_baseline
        return Attribution(scores, *ends, used, gap, example.packed)

    def _wants_more(self, example: Example) -> bool:
        gap = None if example.result is None else example.result.gap
        if gap is None or example.stage + 1 == len(example.attempts):
            return False
        return gap > self.options.ig_tolerance

    def take_gradients(self, examples: Sequence[Example]) -> None:
        """Adds the products of gradient and distance for every new place of each one's stage."""
        if self.options.attribution is AttributionMethod.random:
            return
        for example in examples:
            example.products = example.products[: example.attempt.kept]
        for one_row in (True, False):
            stream = [
                (example, place)
                for example in examples
                if example.packed is one_row
                for place in example.attempt.places
            ]
            self._run(stream, one_row)

    def _run(self, stream: list[tuple[Example, Place]], packed: bool) -> None:
        rows_each = 1 if packed else 2
        lengths = [row_length(example.pair, packed) for example, _ in stream]
        done = 0
        while done < len(stream):
            size = self.room.fit(lengths[done:], rows_each)
            batch = stream[done : done + size]
            longest = max(lengths[done : done + size])
            try:
                products = self._products(batch, packed, longest)
            except RuntimeError as error:
                if not out_of_memory(error) or not self.room.shrink(
                    len(batch), rows_each, longest, self.decoder.device
                ):
                    raise
                products = []  # tried again below, where the error holds no tensors any more
            if not products:
                torch.cuda.empty_cache()
                continue
            for (example, _), product in zip(batch, products, strict=True):
                example.products.append(product)
            done += len(batch)

    def _products(
        self, batch: Sequence[tuple[Example, Place]], packed: bool, longest: int
    ) -> list[Tensor]:
        leaves = [place().detach().requires_grad_() for _, place in batch]
        twice = self.room.recomputes(longest, self.decoder.device)
        if twice and self.decoder.device.type == "cpu":
            return_freed_memory()
        with recomputed(self.decoder.blocks) if twice else nullcontext():
            values = contrast(
                self.decoder, [example.pair for example, _ in batch], leaves, packed,
                self.options.objective,
            )  # fmt: skip
            gradients = torch.autograd.grad(values.sum(), leaves)
        return [
            (gradient.double() * example.distance).sum(1)
            for (example, _), gradient in zip(batch, gradients, strict=True)
        ]

    def _require_finite(self, value: Tensor, pair: TokenPair, what: str) -> None:
        if not torch.isfinite(value).all():
            raise InputError(
                f"{pair.pair.where}: {what} holds a NaN or infinity with model "
                f"'{self.decoder.name}' in {self.decoder.dtype}"
            )
