"""The expected log-probabilities: a transformers forward, the shift written out in float64 hooks.

Shares no code with the product: layers, gains and the formula are spelt out again here.
"""

from contextlib import ExitStack
from typing import Any

import torch

from tests.tiny import LAYERS, REFERENCE_NORM, build_model, random_vector

# The catalogue of tests.tiny.save_world, by hand: layers (None: all), gain of strength 1, defaults.
_ENTRIES: dict[str, tuple[list[int] | None, float, float, str]] = {
    "a": (None, REFERENCE_NORM, 0.5, "all"),
    "b": ([1], REFERENCE_NORM, 0.5, "all"),
    "c": (None, REFERENCE_NORM, 0.5, "prompt"),
    "d": ([0, 2], 1.0, 4.0, "generation"),
}


def token_logprobs(
    name: str, prompt: list[int], generated: list[int], extra_args: dict[str, Any] | None
) -> torch.Tensor:
    """log p of each token after the first given those before it, [tokens - 1]."""
    model = build_model(name)
    tokens = torch.tensor([prompt + generated])
    with ExitStack() as stack, torch.no_grad():
        if extra_args:
            for handle in _hooks(name, model, len(prompt), tokens.shape[1], extra_args):
                stack.callback(handle.remove)
        logits = model(tokens).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def _hooks(
    name: str, model: Any, prompt_len: int, length: int, extra_args: dict[str, Any]
) -> list[Any]:
    vector, _, inline = extra_args["steering"].partition("=")
    layers, gain, strength, positions = _ENTRIES[vector]
    strength = float(inline or extra_args.get("steering_strength", strength))
    positions = extra_args.get("steering_positions", positions)
    prompt_len = extra_args.get("steering_prompt_tokens", prompt_len)
    steered = {
        "all": torch.ones(length, dtype=torch.bool),
        "prompt": torch.arange(length) < prompt_len,
        "generation": torch.arange(length) >= prompt_len,
    }[positions]
    directions = random_vector(name, "abcd".index(vector)).directions.double()
    blocks = model.model.layers if name == "llama" else model.transformer.h

    def hook(layer: int) -> Any:
        def shift(_module: Any, _inputs: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            h = stream.double()
            u = h + strength * gain * directions[layer]
            moved = u * (h.norm(dim=-1) / u.norm(dim=-1)).unsqueeze(-1)
            new = torch.where(steered[:, None], moved, h).to(stream.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return shift

    chosen = range(LAYERS[name]) if layers is None else layers
    return [blocks[layer].register_forward_hook(hook(layer)) for layer in chosen]
