"""The expected log-probabilities of an answer: transformers, the shift in float64 hooks."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.soak.expected import Part
from benchmarks.soak.world import MODEL, REFERENCE_NORM


def answer_logprobs(prompt: list[int], answer: list[int], parts: list[Part]) -> list[float]:
    """log p of each token of the answer given what stands before it."""
    model = _model()
    tokens = torch.tensor([prompt + answer])
    with ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            added = _added(layer, tokens.shape[1], parts)
            stack.callback(block.register_forward_hook(_hook(added)).remove)
        logps = model(tokens).logits[0].double().log_softmax(-1)
    first = len(prompt)
    return [float(logps[first - 1 + n, token]) for n, token in enumerate(answer)]


@cache
def _model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def _added(layer: int, length: int, parts: list[Part]) -> torch.Tensor:
    """[length, hidden] float64: the sum of what every vector adds here."""
    added = torch.zeros(length, parts[0].vector.directions.shape[1] if parts else 1).double()
    for part in parts:
        if layer in part.layers:
            row = part.strength * REFERENCE_NORM * part.vector.directions[layer].double()
            added[[p for p in range(length) if part.steers(p)]] += row
    return added


def _hook(added: torch.Tensor) -> Callable[[Any, Any, Any], Any]:
    def shift(_module: Any, _inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        h = stream.double()
        u = h + added
        moved = (u * (h.norm(dim=-1) / u.norm(dim=-1)).unsqueeze(-1)).to(stream.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return shift
