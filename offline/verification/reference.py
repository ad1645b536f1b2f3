"""Log-probabilities by transformers, with the method's formula written out in float64 hooks.

On purpose not the function that the server computes with (grains_vllm.shift): a mistake there would
be in both.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from grains_vllm.catalogue import VectorEntry
from grains_vllm.positions import Positions
from grains_vllm.vectors import SteeringVector
from offline.blocks import find_blocks, stream_of
from offline.model import auto_class

Terms = Sequence[tuple[VectorEntry, float, str]]  # strength, positions


class Reference:
    """A transformers model in float32 on the CPU."""

    def __init__(self, model: str) -> None:
        """Loads it.

        Args:
            model: folder or hub id.

        Raises:
            OSError, ValueError: transformers cannot.
        """
        self._model = auto_class(model).from_pretrained(model, dtype=torch.float32).eval()
        path = find_blocks(self._model, type(self._model).__name__)
        self._blocks = list(self._model.get_submodule(path))
        self._vectors: dict[str, SteeringVector] = {}

    def logprobs(self, tokens: Sequence[int], border: int, terms: Terms) -> list[float]:
        """log p of each token after the first, given those before it.

        Args:
            border: how many of the tokens are prompt.
        """
        with self._steered(len(tokens), border, terms), torch.no_grad():
            logits = self._model(torch.tensor([list(tokens)])).logits[0, :-1].double()
        wanted = torch.tensor(list(tokens[1:]))[:, None]
        found: list[float] = logits.log_softmax(-1).gather(1, wanted)[:, 0].tolist()
        return found

    @contextmanager
    def _steered(self, length: int, border: int, terms: Terms) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, block in enumerate(self._blocks):
                deltas = self._deltas(layer, length, border, terms)
                if deltas is not None:
                    stack.callback(block.register_forward_hook(_hook(deltas)).remove)
            yield

    def _deltas(self, layer: int, length: int, border: int, terms: Terms) -> Tensor | None:
        """What is added to each token's stream, [tokens, hidden] float64."""
        whole: Tensor | None = None
        for entry, strength, positions in terms:
            if layer not in entry.layers:
                continue
            vector = self._vectors.setdefault(entry.path, SteeringVector.load(entry.path))
            gain = float(vector.reference_norms[layer]) if entry.scale == "relative" else 1.0
            hit = torch.zeros(length, dtype=torch.bool)
            for start, end in Positions.parse(positions).spans(border):
                hit[start:end] = True
            delta = hit[:, None] * (strength * gain * vector.directions[layer].double())
            whole = delta if whole is None else whole + delta
        return whole


def _hook(deltas: Tensor) -> Any:
    def steer(_module: Any, _inputs: Any, output: Any) -> Any:
        h = stream_of(output).double()
        u = h + deltas
        moved = u * (h.norm(dim=-1) / u.norm(dim=-1))[..., None]
        moved = torch.where((deltas != 0).any(-1)[:, None], moved, h).to(stream_of(output).dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return steer
