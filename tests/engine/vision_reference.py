"""The expected log-probabilities of prompts with images, as reference.py has them for text.

Which tokens hold image features is read off the token ids, not off what vLLM says.
"""

from functools import cache
from typing import Any

import torch

from tests.engine.reference import chosen_logprobs, shifted, terms_of
from tests.vision import build_model, build_processor, image_token_id, picture

_model = cache(build_model)


def token_logprobs(
    name: str,
    prompt: list[int],
    generated: list[int],
    pictures: list[Any],
    extra_args: dict[str, Any] | None,
) -> torch.Tensor:
    """log p of each token after the first given those before it, [tokens - 1].

    Args:
        prompt: as the processor makes it, with a token per image feature.
        pictures: (seed, size) of each image.
    """
    ids, model = prompt + generated, _model(name)
    image = torch.tensor(ids) == image_token_id(name)
    image[len(prompt) :] = False
    terms = terms_of("llama", len(prompt), len(ids), extra_args, image) if extra_args else []
    inputs = _pixels(name, pictures)
    if name.startswith("qwen"):  # M-RoPE goes by it
        inputs["mm_token_type_ids"] = image[None].long()
    # Gemma 3 gets no token types: vLLM's CPU attention knows no bidirectional images.
    with shifted(model.model.language_model.layers, terms), torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), **inputs).logits[0, :-1]
    return chosen_logprobs(logits, ids)


def _pixels(name: str, pictures: list[Any]) -> dict[str, torch.Tensor]:
    """What the processor makes of the images, whatever the text around them."""
    if not pictures:
        return {}
    processor = build_processor(name)
    images = [picture(seed, tuple(size)) for seed, size in pictures]
    made = processor.image_processor(images, return_tensors="pt")
    wanted = ("pixel_values", "image_sizes", "image_grid_thw")
    return {key: made[key] for key in wanted if key in made}
