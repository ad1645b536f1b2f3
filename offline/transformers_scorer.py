"""Scoring with a transformers model and hooks, one point after the other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.utils.rnn import pad_sequence

from grains_vllm.vectors import SteeringVector
from offline.model import Decoder
from offline.objective import Row, batch_inputs, logits_at
from offline.prompt_inputs import prompt_inputs
from offline.scoring import Item, ItemScore, Point
from offline.steer import steered


class TransformersScorer:
    """A Scorer (see offline.scoring) over a loaded model.

    Attributes:
        vectors: by the names that points use.
        batch_rows: items per forward.
    """

    def __init__(
        self, decoder: Decoder, vectors: Mapping[str, SteeringVector], batch_rows: int = 32
    ) -> None:
        self.decoder = decoder
        self.vectors = vectors
        self.batch_rows = batch_rows

    def score(
        self, items: Sequence[Item], points: Sequence[Point | None]
    ) -> Iterator[tuple[int, list[ItemScore]]]:
        """See offline.scoring.Scorer."""
        # Items of like lengths share a batch, so that little of it is padding.
        order = sorted(range(len(items)), key=lambda index: _length(items[index]))
        batches = [
            order[start : start + self.batch_rows]
            for start in range(0, len(order), self.batch_rows)
        ]
        for number, point in enumerate(points):
            found: dict[int, ItemScore] = {}
            for batch in batches:
                scores = self._batch([items[index] for index in batch], point)
                found.update(zip(batch, scores, strict=True))
            yield number, [found[index] for index in range(len(items))]

    @torch.no_grad()
    def _batch(self, items: Sequence[Item], point: Point | None) -> list[ItemScore]:
        device = self.decoder.device
        ids = [torch.tensor(item.prompt_ids + item.response_ids) for item in items]
        lengths = torch.tensor([len(row) for row in ids])
        prompts = torch.tensor([len(item.prompt_ids) for item in items])
        counts = lengths - prompts
        # Logits at t score token t + 1. Columns beyond a row's answer repeat its last one.
        steps = torch.arange(int(counts.max()))
        steps = torch.minimum(steps[None], counts[:, None] - 1)
        scored_at = (prompts[:, None] - 1 + steps).to(device)
        tokens = pad_sequence(ids, batch_first=True)
        if any(item.image is not None for item in items):
            inputs = batch_inputs(self.decoder, [self._row(item) for item in items])
        else:
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        context = nullcontext() if point is None else self._steered(point, items, prompts)
        with context, logits_at(self.decoder.model, scored_at) as select:
            logits = select(self.decoder.model(**inputs, use_cache=False).logits).float()
        targets = tokens.gather(1, prompts[:, None] + steps).to(logits.device)
        logps = logits.log_softmax(-1)
        chosen = logps.gather(2, targets[..., None])
        first = (logps >= chosen).sum(-1) == 1
        real = torch.arange(steps.shape[1]) < counts[:, None]
        real = real.to(logits.device)
        sums = (chosen[..., 0].double() * real).sum(1).tolist()
        greedy = (first | ~real).all(1).tolist()
        return [ItemScore(*pair) for pair in zip(sums, greedy, strict=True)]

    def _row(self, item: Item) -> Row:
        place = prompt_inputs(self.decoder, item.prompt_ids, item.image)
        return Row(place.embeds, ((item.response_ids, 1),), place)

    def _steered(
        self, point: Point, items: Sequence[Item], prompts: torch.Tensor
    ) -> AbstractContextManager[None]:
        flags = [torch.tensor(item.image_tokens) for item in items]
        return steered(
            self.decoder.model, self.vectors[point.vector], point.strength, point.layers,
            point.positions, prompt_length=prompts,
            image_tokens=pad_sequence(flags, batch_first=True),
            blocks=self.decoder.blocks_path,
        )  # fmt: skip


def _length(item: Item) -> int:
    return len(item.prompt_ids) + len(item.response_ids)
