"""The steps that an engine of an image model is asked, by name."""

from typing import Any

from tests.vision import PLACEHOLDER, build_processor, image_token_id

SMALL, WIDE, TALL = (32, 32), (40, 24), (24, 40)
LONG = "a red circle is left of the blue square and there is no green bar in the picture : " * 2


def request(name: str, text: str, images: list[Any] = (), **extra_args: Any) -> dict[str, Any]:
    """A prompt in which `@` stands for the next of the images, each (seed, size)."""
    content = text.replace("@", PLACEHOLDER[name])
    tokens = build_processor(name).tokenizer(
        f"<user> {content} <end><assistant>", add_special_tokens=False
    )["input_ids"]
    return {
        "prompt": tokens,
        "images": list(images),
        "extra_args": extra_args or None,
        # transformers takes every such token for an image feature, generated ones too.
        "never": [image_token_id(name)],
    }


def steps(name: str) -> dict[str, Any]:
    """Step by name; each a list of requests in one batch, answered together."""

    def scored(*args: Any, **more: Any) -> dict[str, Any]:
        return {**request(name, *args, **more), "prompt_logprobs": 0}

    def at(positions: str, **more: Any) -> dict[str, Any]:
        return {"steering": "a", "steering_positions": positions, **more}

    ask, asked = "@ what colour is the circle ?", [(0, WIDE)]
    # Together far more than a step's tokens: prompts are cut, also within an image.
    mixed = [
        scored(ask, asked),
        scored(ask, asked, **at("all")),
        scored(ask, [(1, TALL)], **at("text")),
        scored("describe the picture", **at("text")),
        scored(ask, [(2, SMALL)], **at("image")),
        scored("describe the red bar and count one two three"),
        scored("see @ and @ : which shape is big ?", [(3, WIDE), (4, TALL)], **at("text")),
        scored("see @ and @ : which shape is big ?", [(4, TALL), (3, WIDE)], **at("image")),
        scored(LONG + ask, [(5, WIDE)], **at("prompt")),
        scored(ask, [(6, TALL)], **at("generation")),
        scored("describe the picture", **at("image")),
        scored(f"@ {LONG}", [(7, WIDE)], **at("prompt:9+generation:2")),
        scored(ask, [(8, TALL)], steering="a=0.3,c=0.4,d"),
        scored(LONG + ask, [(0, TALL)], steering="b=-0.7", steering_positions="image"),
        scored(f"{ask} {LONG}", [(1, SMALL)], steering="a", steering_positions="text",
               steering_layers=[0, 2]),
        scored("two @ @ of them", [(0, SMALL), (1, SMALL)]),
    ]  # fmt: skip

    def cached(label: str, image: Any, fresh: bool = False, **args: Any) -> dict[str, Any]:
        text = f"{LONG} {ask} yes , no , or two ?"
        return {"fresh_cache": fresh, "requests": [request(name, text, [image], **args)]}

    first, other = (0, WIDE), (1, WIDE)
    return {
        "mixed": {"requests": mixed},
        "cache plain": cached("plain", first, True),
        "cache plain again": cached("again", first),
        "cache other image": cached("other image", other),
        "cache all": cached("all", first, **at("all")),
        "cache all again": cached("all again", first, **at("all")),
        "cache text": cached("text", first, **at("text")),
        "cache text again": cached("text again", first, **at("text")),
        "cache text, other image": cached("text, other image", other, **at("text")),
        "cache image": cached("image", first, **at("image")),
        "cache image again": cached("image again", first, **at("image")),
        "cache generation": cached("generation", first, **at("generation")),
        "cache prompt": cached("prompt", first, **at("prompt")),
    }
