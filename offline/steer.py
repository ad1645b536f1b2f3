"""Steering a transformers model with hooks: the same formula as the server's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grains_vllm.shift import shift
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.blocks import find_blocks, stream_of

Positions = Literal["all", "prompt", "generation"]


@contextmanager
def steered(
    model: Any,
    vector: SteeringVector,
    strength: float,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    *,
    prompt_length: int | Tensor | None = None,
    scale: Literal["relative", "absolute"] = "relative",
    blocks: str | None = None,
) -> Iterator[None]:
    """Steers every forward of `model` inside the context, and leaves it as it was.

    Args:
        model: a transformers causal language model.
        strength: lambda, a fraction of the layer's usual ||h||. 0 changes no bit.
        layers: which layers; by default the vector's recommended ones.
        positions: which tokens are shifted; others keep their bits.
        prompt_length: needed unless `positions` is "all": how many columns of the whole sequence
            (padding included) are prompt; an int, or [batch] long.
        scale: "absolute" drops the reference norm, so that strength is a length.
        blocks: the name of the block list, if it is not found by itself.

    Raises:
        ArtifactError: the vector was made for another model.
        ValueError: a layer without direction, or `prompt_length` is missing.
    """
    vector.model.require(ModelFingerprint.of(model.config), "vector")
    chosen = vector.recommended_layers if layers is None else list(layers)
    unknown = sorted(set(chosen) - set(vector.layers))
    if unknown:
        raise ValueError(f"layers {unknown} hold no direction, those that do are {vector.layers}")
    if positions not in ("all", "prompt", "generation"):
        raise ValueError(f"positions is {positions!r}, expected 'all', 'prompt' or 'generation'")
    if positions != "all" and prompt_length is None:
        raise ValueError(f"positions '{positions}' needs prompt_length")
    if strength == 0:
        yield
        return
    modules = model.get_submodule(find_blocks(model, type(model).__name__, blocks))
    lengths = vector.reference_norms if scale == "relative" else torch.ones(vector.num_layers)
    columns = _Columns(positions, prompt_length)
    with ExitStack() as stack:
        handle = model.register_forward_pre_hook(columns.count, with_kwargs=True)
        stack.callback(handle.remove)
        for layer in chosen:
            delta = strength * lengths[layer] * vector.directions[layer]
            stack.callback(modules[layer].register_forward_hook(_hook(delta, columns)).remove)
        yield


class _Columns:
    """Knows which columns of the sequence the current forward computes."""

    def __init__(self, positions: Positions, prompt_length: int | Tensor | None) -> None:
        self.positions = positions
        self.prompt_length = prompt_length
        self.past = 0

    def count(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def steered(self, stream: Tensor) -> Tensor | None:
        """[batch or 1, tokens, 1] flags, or None for all."""
        if self.positions == "all" or self.prompt_length is None:
            return None
        columns = self.past + torch.arange(stream.shape[1], device=stream.device)
        lengths = torch.as_tensor(self.prompt_length, device=stream.device).reshape(-1, 1)
        prompt = columns[None] < lengths
        return (prompt if self.positions == "prompt" else ~prompt)[..., None]


def _hook(delta: Tensor, columns: _Columns) -> Any:
    def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
        stream = stream_of(output)
        moved = shift(stream, delta.to(stream.device)).to(stream.dtype)
        flags = columns.steered(stream)
        if flags is not None:
            moved = torch.where(flags, moved, stream)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return steer
