"""A TransformersScorer that computes the blocks below the first steered layer only once.

A sweep asks for hundreds of points over the same items, and no point changes what comes before its
first layer. The scores are the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from grains_vllm.vectors import SteeringVector
from offline.blocks import stream_of
from offline.model import Decoder
from offline.scoring import Item, ItemScore, Point
from offline.steer import steered
from offline.transformers_scorer import TransformersScorer


class SharedPrefixScorer(TransformersScorer):
    """See offline.scoring.Scorer; for small models, since it keeps every item's streams."""

    def __init__(self, decoder: Decoder, vectors: Mapping[str, SteeringVector]) -> None:
        super().__init__(decoder, vectors)
        self._streams: dict[tuple[Item, ...], list[Tensor]] = {}  # by batch, after each block
        self._recorded: set[tuple[Item, ...]] = set()
        self._first: int | None = None  # the first steered layer, while items are scored

    def score(
        self, items: Sequence[Item], points: Sequence[Point | None]
    ) -> Iterator[tuple[int, list[ItemScore]]]:
        """See offline.scoring.Scorer; steers all positions only."""
        for number, point in enumerate(points):
            with ExitStack() as stack:
                self._first = None
                if point is not None:
                    assert point.positions == "all", point
                    if tuple(items) not in self._recorded:
                        list(super().score(items, [None]))
                        self._recorded.add(tuple(items))
                    vector = self.vectors[point.vector]
                    stack.enter_context(
                        steered(self.decoder.model, vector, point.strength, point.layers)
                    )
                    self._first = min(point.layers)
                _, scores = next(iter(super().score(items, [None])))
            yield number, scores

    def _batch(self, items: Sequence[Item], point: Point | None) -> list[ItemScore]:
        key, blocks = tuple(items), self.decoder.blocks
        if self._first is None:
            with _recorded(blocks) as streams:
                scores = super()._batch(items, None)
            self._streams[key] = streams
            return scores
        if self._first == 0:
            return super()._batch(items, None)
        with _replayed(blocks[: self._first], self._streams[key][self._first - 1]):
            return super()._batch(items, None)


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects every block's output, [batch, tokens, hidden] each."""
    streams: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, out: streams.append(stream_of(out)))
        for block in blocks
    ]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(blocks: Sequence[nn.Module], stream: Tensor) -> Iterator[None]:
    """Makes `blocks` return `stream` without computing anything."""

    def forward(*_args: Any, **_kwargs: Any) -> Tensor:
        return stream

    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again
