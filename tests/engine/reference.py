"""The expected log-probabilities: a transformers forward, the shift written out in float64 hooks.

Shares no code with the product: layers, gains, windows and the formula are spelt out again here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Term:
    """One vector of a request: `added` [layers, hidden] is float64."""

    added: torch.Tensor
    layers: list[int]
    steered: torch.Tensor  # [tokens] bool


def token_logprobs(
    name: str, prompt: list[int], generated: list[int], extra_args: dict[str, Any] | None
) -> torch.Tensor:
    """log p of each token after the first given those before it, [tokens - 1]."""
    logits = token_logits(name, build_model(name), prompt + generated, len(prompt), extra_args)
    return chosen_logprobs(logits, prompt + generated)


def chosen_logprobs(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """log p of each of `tokens` after the first, from the logits [tokens - 1, vocabulary]."""
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]


def token_logits(
    name: str, model: Any, ids: list[int], border: int, extra_args: dict[str, Any] | None
) -> torch.Tensor:
    """What a model of the kind `name` says after each of `ids` but the last, [tokens - 1, vocab].

    Args:
        border: how many of `ids` are prompt.
    """
    terms = terms_of(name, border, len(ids), extra_args) if extra_args else []
    blocks = model.model.layers if name == "llama" else model.transformer.h
    with shifted(blocks, terms), torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, :-1]
    return logits


@contextmanager
def shifted(blocks: Any, terms: list[Term]) -> Iterator[None]:
    """Hooks that shift what leaves each block."""
    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            here = [term for term in terms if layer in term.layers]
            if here:
                stack.callback(block.register_forward_hook(_shift(here, layer)).remove)
        yield


def terms_of(
    name: str,
    border: int,
    length: int,
    extra_args: dict[str, Any],
    image: torch.Tensor | None = None,
) -> list[Term]:
    """What `extra_args` ask for in a request of `length` tokens, the first `border` its prompt.

    Args:
        image: [tokens] bool, which of them hold image features; by default none.
    """
    image = torch.zeros(length, dtype=torch.bool) if image is None else image
    border = extra_args.get("steering_prompt_tokens", border)
    narrowed = extra_args.get("steering_layers", list(range(LAYERS[name])))
    narrowed = [narrowed] if isinstance(narrowed, int) else narrowed
    terms = []
    for part in extra_args["steering"].split(","):
        vector, _, inline = part.replace(" ", "").partition("=")
        layers, gain, strength, positions = _ENTRIES[vector]
        strength = float(inline or extra_args.get("steering_strength", strength))
        positions = extra_args.get("steering_positions", positions)
        directions = random_vector(name, "abcd".index(vector)).directions.double()
        own = range(LAYERS[name]) if layers is None else layers
        terms.append(
            Term(
                strength * gain * directions,
                [layer for layer in own if layer in narrowed],
                _window(positions, border, length, image),
            )
        )
    return terms


def _window(positions: str, border: int, length: int, image: torch.Tensor) -> torch.Tensor:
    """Which of `length` tokens are steered, the first `border` of them being the prompt."""
    if positions in ("text", "image"):
        return image if positions == "image" else ~image
    column = torch.arange(length)
    steered = torch.zeros(length, dtype=torch.bool)
    for part in ("prompt+generation" if positions == "all" else positions).split("+"):
        word, _, count = part.partition(":")
        near = int(count) if count else length
        if word == "prompt":
            steered |= (column < border) & (column >= border - near)
        else:
            assert word == "generation", positions
            steered |= (column >= border) & (column < border + near)
    return steered


def _shift(terms: list[Term], layer: int) -> Any:
    """All terms are added first, then the sum is brought back to the stream's norm, once."""
    touched = torch.stack([term.steered for term in terms]).any(dim=0)[:, None]
    added = sum(term.steered[:, None] * term.added[layer] for term in terms)

    def shift(_module: Any, _inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        h = stream.double()
        u = h + added
        moved = u * (h.norm(dim=-1) / u.norm(dim=-1)).unsqueeze(-1)
        new = torch.where(touched, moved, h).to(stream.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return shift
