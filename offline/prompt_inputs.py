"""What the decoder blocks are given for a prompt: the leaf of attribution and its surroundings.

For a prompt with an image this is taken from the model's own forward with the pixels: the merged
embeddings, with image features in their places, and the positions that go with them. From then on
a forward from these embeddings is the ordinary one, for any embeddings in their place.
"""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offline.batching import out_of_memory
from offline.errors import InputError
from offline.vision import ImagePrompt, process

if TYPE_CHECKING:
    from offline.model import Decoder

# What a language model's forward takes beside the embeddings without being told more by them.
_KNOWN = {
    "inputs_embeds", "position_ids", "attention_mask", "token_type_ids", "mm_token_type_ids",
    "cache_position",
}  # fmt: skip


@dataclass(frozen=True)
class PromptInputs:
    """A prompt in front of the decoder blocks.

    Attributes:
        embeds: [T, hidden] in the model's dtype.
        positions: [axes, T] long; one axis, or the three of M-RoPE.
        token_types: [T] long, which some models need to let image tokens see each other both ways;
            None elsewhere.
        image_tokens: [T] bool.
    """

    embeds: Tensor
    positions: Tensor
    token_types: Tensor | None
    image_tokens: Tensor

    @property
    def num_bytes(self) -> int:
        return self.embeds.numel() * self.embeds.element_size()


class PromptCache:
    """Keeps what the vision tower has made of the last prompts with an image."""

    def __init__(self, limit: int = 2**31) -> None:
        self._limit, self._held = limit, 0
        self._found: OrderedDict[ImagePrompt, PromptInputs] = OrderedDict()

    def get(self, image: ImagePrompt) -> PromptInputs | None:
        if image in self._found:
            self._found.move_to_end(image)
        return self._found.get(image)

    def put(self, image: ImagePrompt, inputs: PromptInputs) -> None:
        self._found[image] = inputs
        self._held += inputs.num_bytes
        while self._held > self._limit and len(self._found) > 1:
            self._held -= self._found.popitem(last=False)[1].num_bytes


def prompt_inputs(
    decoder: "Decoder", ids: Sequence[int], image: ImagePrompt | None
) -> PromptInputs:
    """Embeddings, positions and token types of one prompt.

    Args:
        ids: T token ids, image tokens included.
        image: None for a prompt of text alone.

    Raises:
        InputError: the model hands its blocks more than embeddings and positions, so that it
            cannot be attributed through them.
    """
    if image is None:
        embeds = decoder.embed(list(ids))
        positions = torch.arange(len(ids), device=embeds.device)[None]
        return PromptInputs(
            embeds, positions, None, torch.zeros(len(ids), dtype=torch.bool, device=embeds.device)
        )
    found = decoder.prompts.get(image)
    if found is None:
        found = _merged(decoder, image)
        decoder.prompts.put(image, found)
    return found


class _Captured(Exception):
    """Ends a forward once its language model has been given its inputs."""


def _merged(decoder: "Decoder", image: ImagePrompt) -> PromptInputs:
    inputs = model_inputs(decoder, image)
    given: dict[str, Any] = {}

    def capture(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)
        raise _Captured

    language = decoder.model.get_submodule(decoder.blocks_path.rpartition(".")[0])
    handle = language.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            decoder.model(**inputs, use_cache=False)
    except _Captured:
        pass
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(
            f"model '{decoder.name}' refuses a prompt with an image: {error}"
        ) from error
    finally:
        handle.remove()
    embeds = given.get("inputs_embeds")
    if not isinstance(embeds, Tensor) or embeds.shape[:2] != (1, len(image.ids)):
        raise InputError(
            f"model '{decoder.name}' does not hand one embedding per prompt token to its language "
            "model, so an image's share cannot be attributed"
        )
    more = sorted(
        name for name, value in given.items() if name not in _KNOWN and _holds_tensor(value)
    )
    if more:
        raise InputError(
            f"model '{decoder.name}' hands its language model {', '.join(more)} beside the "
            "embeddings (as DeepStack does), so that attributing embeddings would miss a part of "
            "the image; such models are not supported"
        )
    flags = torch.tensor(image.image_tokens, device=decoder.device)
    _require_features(decoder, inputs["input_ids"][0], embeds[0], flags)
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(len(image.ids), device=decoder.device)[None, None]
    positions = positions.reshape(-1, len(image.ids))
    if positions.shape[0] == 4:  # with the text's own positions before M-RoPE's three
        positions = positions[1:]
    _require_three_axes(decoder, positions, flags)
    types = None
    if takes_token_types(decoder):
        if "token_type_ids" not in inputs:
            raise InputError(
                f"the processor of model '{decoder.name}' gives no token_type_ids, without which "
                "its image tokens would not see each other"
            )
        types = inputs["token_type_ids"][0]
    return PromptInputs(embeds[0].detach(), positions, types, flags)


def model_inputs(decoder: "Decoder", image: ImagePrompt) -> dict[str, Any]:
    """The keyword arguments of the model's ordinary forward with the pixels, on its device.

    Raises:
        InputError: the processor lays the prompt out in another way than before.
    """
    inputs = {
        name: value.to(decoder.device) if isinstance(value, Tensor) else value
        for name, value in process(
            decoder.processor, image.text, image.picture, image.special
        ).items()
    }
    if tuple(inputs["input_ids"][0].tolist()) != image.ids:
        raise InputError(f"{image.picture.name}: the processor's token ids change between calls")
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.to(decoder.dtype)
    return inputs


def takes_token_types(decoder: "Decoder") -> bool:
    """Whether the model tells image tokens apart by their types, as Gemma 3 does."""
    return "token_type_ids" in inspect.signature(decoder.model.forward).parameters


def _require_features(decoder: "Decoder", ids: Tensor, embeds: Tensor, flags: Tensor) -> None:
    """Refuses a layout in which image features stand elsewhere than at the image tokens."""
    text_differs = not torch.equal(embeds[~flags], decoder.embed(ids[~flags]))
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    known = flags & (ids < rows)
    unfilled = (embeds[known] == decoder.embed(ids[known])).all(-1).any()
    if text_differs or unfilled:
        raise InputError(
            f"model '{decoder.name}': the embeddings of a prompt with an image are not those of "
            "its text with image features at the image tokens"
        )


def _require_three_axes(decoder: "Decoder", positions: Tensor, flags: Tensor) -> None:
    """Refuses one-dimensional positions of image tokens where the model has M-RoPE."""
    rope: Any = getattr(decoder.text_config, "rope_parameters", None)
    rope = rope or getattr(decoder.text_config, "rope_scaling", None) or {}
    if "mrope_section" not in rope:
        return
    axes = positions[:, flags]
    if len(axes) != 3 or (int(flags.sum()) > 1 and bool((axes == axes[:1]).all())):
        raise InputError(
            f"model '{decoder.name}': its image tokens have one-dimensional positions where M-RoPE "
            "has three axes; the processor gives no image grid or no mm_token_type_ids"
        )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)
