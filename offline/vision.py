"""Prompts with an image: what a model's processor makes of text and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offline.errors import InputError
from offline.pictures import Picture


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A prompt as the processor lays it out; compared and hashed by identity.

    Attributes:
        text: the prompt with its one placeholder for the image.
        special: whether the tokenizer adds its own special tokens, as it does to raw text.
        plain_ids: the token ids with the placeholder as it stands in the text.
        ids: T token ids, the placeholder expanded to one id per image feature.
        image_tokens: T flags, True where an image feature stands.
    """

    text: str
    picture: Picture
    special: bool
    plain_ids: tuple[int, ...]
    ids: tuple[int, ...]
    image_tokens: tuple[bool, ...]


def process(processor: Any, prompt_text: str, picture: Picture, special: bool) -> dict[str, Any]:
    """The keyword arguments of the model's forward for one prompt, as tensors [1, ...]."""
    return dict(
        processor(
            text=[prompt_text],
            images=[picture.image],
            add_special_tokens=special,
            return_tensors="pt",
        )
    )


def image_prompt(
    processor: Any, text: str, picture: Picture, special: bool, where: str
) -> ImagePrompt:
    """Lays out a prompt.

    Raises:
        InputError: the text has no placeholder, or the processor refuses it.
    """
    try:
        inputs = process(processor, text, picture, special)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # processors raise whatever their parts raise
        count = text.count(placeholder(processor))
        if count > 1:
            raise InputError(
                f"{where}: the prompt has {count} times {placeholder(processor)!r}, the place of "
                "an image, for one image"
            ) from error
        hint = ""
        if not count:
            hint = f"; raw text needs {placeholder(processor)!r} where the image belongs"
        raise InputError(
            f"{where}: {type(processor).__name__} refuses prompt and image ({error}){hint}"
        ) from error
    ids = inputs["input_ids"][0].tolist()
    image = image_token_id(processor)
    flags = tuple(token == image for token in ids)
    if not any(flags):
        raise InputError(
            f"{where}: the prompt has no place for its image; raw text needs "
            f"{placeholder(processor)!r}, or make it a chat with --chat"
        )
    plain = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    return ImagePrompt(text, picture, special, tuple(plain), tuple(ids), flags)


def image_token_id(processor: Any) -> int:
    """The id that stands for an image feature in a prompt's ids."""
    # Gemma 3's processor calls the placeholder its image token; its tokenizer knows the features'.
    for owner in (processor.tokenizer, processor):
        found = getattr(owner, "image_token_id", None)
        if found is not None:
            return int(found)
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def placeholder(processor: Any) -> str:
    """What stands for an image in a prompt's text."""
    # Gemma 3 has one token for the place of an image and another for its features.
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def sources(plain: Sequence[int], expanded: Sequence[int]) -> list[int | None]:
    """For each expanded position the position in the plain ids that it stands for; None for what
    the processor has put in the placeholder's place."""
    shorter = min(len(plain), len(expanded))
    start = 0
    while start < shorter and plain[start] == expanded[start]:
        start += 1
    end = 0
    while end < shorter - start and plain[-1 - end] == expanded[-1 - end]:
        end += 1
    middle = len(expanded) - start - end
    return [*range(start), *[None] * middle, *range(len(plain) - end, len(plain))]
