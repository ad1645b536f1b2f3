"""Steering a transformers model with hooks: the same formula as the server's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grains_vllm.positions import IMAGE, Positions, PositionsError
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
    image_tokens: Tensor | None = None,
    scale: Literal["relative", "absolute"] = "relative",
    blocks: str | None = None,
) -> Iterator[None]:
    """Steers every forward of `model` inside the context, and leaves it as it was.

    Args:
        model: a transformers model that generates text, from text alone or with images.
        strength: lambda, a fraction of the layer's usual ||h||. 0 changes no bit.
        layers: which layers; by default the vector's recommended ones.
        positions: which tokens are shifted, as grains_vllm.positions reads it; others keep their
            bits.
        prompt_length: needed by positions around the end of the prompt: how many columns of the
            whole sequence (padding included) are prompt; an int, or [batch] long.
        image_tokens: [batch, columns] bool, which of the first columns of the whole sequence
            (padding included) hold image features, for the positions `text` and `image`; later
            columns hold none. Without it there are none at all.
        scale: "absolute" drops the reference norm, so that strength is a length.
        blocks: the name of the block list, if it is not found by itself.

    Raises:
        ArtifactError: the vector was made for another model.
        ValueError: a layer without direction, positions that cannot be read, `prompt_length` is
            missing, or `image_tokens` is no table of flags.
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
    if window.needs_border and prompt_length is None:
        raise ValueError(f"positions '{positions}' needs prompt_length")
    if image_tokens is not None and (image_tokens.dim(), image_tokens.dtype) != (2, torch.bool):
        found = f"{image_tokens.dtype} of shape {list(image_tokens.shape)}"
        raise ValueError(f"image_tokens is {found}, expected bool of [batch, columns]")
    if strength == 0:
        yield
        return
    modules = model.get_submodule(find_blocks(model, type(model).__name__, blocks))
    lengths = vector.reference_norms if scale == "relative" else torch.ones(vector.num_layers)
    columns = _Columns(window, prompt_length, image_tokens)
    with ExitStack() as stack:
        handle = model.register_forward_pre_hook(columns.count, with_kwargs=True)
        stack.callback(handle.remove)
        for layer in chosen:
            delta = strength * lengths[layer] * vector.directions[layer]
            stack.callback(modules[layer].register_forward_hook(_hook(delta, columns)).remove)
        yield


class _Columns:
    """Knows which columns of the sequence the current forward computes."""

    def __init__(
        self,
        window: Positions,
        prompt_length: int | Tensor | None,
        image_tokens: Tensor | None,
    ) -> None:
        self.window = window
        self.prompt_length = prompt_length
        self.image_tokens = image_tokens
        self.past = 0

    def count(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def steered(self, stream: Tensor) -> Tensor | None:
        """[batch or 1, tokens, 1] flags, or None for all."""
        if self.window.only:
            image = self._image(stream.shape[1]).to(stream.device)
            return (image if self.window.only == IMAGE else ~image)[..., None]
        if not self.window.needs_border or self.prompt_length is None:
            return None
        before, after = self.window.before, self.window.after
        columns = self.past + torch.arange(stream.shape[1], device=stream.device)
        lengths = torch.as_tensor(self.prompt_length, device=stream.device).reshape(-1, 1)
        from_border = columns[None] - lengths  # negative in the prompt, from 0 in the answer
        flags = torch.ones_like(from_border, dtype=torch.bool)
        if before is not None:
            flags &= from_border >= -before
        if after is not None:
            flags &= from_border < after
        return flags[..., None]

    def _image(self, tokens: int) -> Tensor:
        """[batch or 1, tokens] flags of the current columns that hold image features."""
        known, end = self.image_tokens, self.past + tokens
        if known is None:
            return torch.zeros(1, tokens, dtype=torch.bool)
        return pad(known, (0, max(0, end - known.shape[1])))[:, self.past : end]


def _hook(delta: Tensor, columns: _Columns) -> Any:
    def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
        stream = stream_of(output)
        moved = shift(stream, delta.to(stream.device)).to(stream.dtype)
        flags = columns.steered(stream)
        if flags is not None:
            moved = torch.where(flags, moved, stream)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return steer
