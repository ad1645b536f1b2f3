"""Steering a transformers model with hooks: the same formula as the server's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grains_vllm.positions import Positions, PositionsError
from grains_vllm.shift import shift
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.blocks import find_blocks, stream_of


@contextmanager
def steered(
    model: Any,
    vector: SteeringVector,
    strength: float,
    layers: Sequence[int] | None = None,
    positions: str = "all",
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
        positions: which tokens are shifted, as grains_vllm.positions reads it; others keep their
            bits.
        prompt_length: needed unless all positions are steered: how many columns of the whole
            sequence (padding included) are prompt; an int, or [batch] long.
        scale: "absolute" drops the reference norm, so that strength is a length.
        blocks: the name of the block list, if it is not found by itself.

    Raises:
        ArtifactError: the vector was made for another model.
        ValueError: a layer without direction, positions that cannot be read, or `prompt_length` is
            missing.
    """
    vector.model.require(ModelFingerprint.of(model.config), "vector")
    chosen = vector.recommended_layers if layers is None else list(layers)
    unknown = sorted(set(chosen) - set(vector.layers))
    if unknown:
        raise ValueError(f"layers {unknown} hold no direction, those that do are {vector.layers}")
    try:
        window = Positions.parse(positions)
    except PositionsError as error:
        raise ValueError(f"positions: {error}") from None
    if str(window) != "all" and prompt_length is None:
        raise ValueError(f"positions '{positions}' needs prompt_length")
    if strength == 0:
        yield
        return
    modules = model.get_submodule(find_blocks(model, type(model).__name__, blocks))
    lengths = vector.reference_norms if scale == "relative" else torch.ones(vector.num_layers)
    columns = _Columns(window, prompt_length)
    with ExitStack() as stack:
        handle = model.register_forward_pre_hook(columns.count, with_kwargs=True)
        stack.callback(handle.remove)
        for layer in chosen:
            delta = strength * lengths[layer] * vector.directions[layer]
            stack.callback(modules[layer].register_forward_hook(_hook(delta, columns)).remove)
        yield


class _Columns:
    """Knows which columns of the sequence the current forward computes."""

    def __init__(self, window: Positions, prompt_length: int | Tensor | None) -> None:
        self.window = window
        self.prompt_length = prompt_length
        self.past = 0

    def count(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def steered(self, stream: Tensor) -> Tensor | None:
        """[batch or 1, tokens, 1] flags, or None for all."""
        before, after = self.window.before, self.window.after
        if (before is None and after is None) or self.prompt_length is None:
            return None
        columns = self.past + torch.arange(stream.shape[1], device=stream.device)
        lengths = torch.as_tensor(self.prompt_length, device=stream.device).reshape(-1, 1)
        from_border = columns[None] - lengths  # negative in the prompt, from 0 in the answer
        flags = torch.ones_like(from_border, dtype=torch.bool)
        if before is not None:
            flags &= from_border >= -before
        if after is not None:
            flags &= from_border < after
        return flags[..., None]


def _hook(delta: Tensor, columns: _Columns) -> Any:
    def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
        stream = stream_of(output)
        moved = shift(stream, delta.to(stream.device)).to(stream.dtype)
        flags = columns.steered(stream)
        if flags is not None:
            moved = torch.where(flags, moved, stream)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return steer
