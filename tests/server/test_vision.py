"""A server of an image model: chats with a picture, steered in every way that HTTP has."""

import base64
import io

import openai
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.engine.reference import Term, chosen_logprobs, shifted
from tests.vision import picture

pytestmark = pytest.mark.engine

QUESTION = "what colour is the circle ?"
IMAGE = picture(3)


class World:
    """A running server and the same model in transformers."""

    def __init__(self, server):
        self.client, path = server.client, server.model
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.shift = server.strength * server.norm * server.directions.double()
        self.image_token = self.model.config.image_token_id

    def ids(self, image=True):
        """The prompt as transformers lays it out."""
        parts = [{"type": "image"}] if image else []
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = {"images": [IMAGE]} if image else {}
        made = self.processor(text=text, add_special_tokens=False, **images)
        return [int(token) for token in made["input_ids"][0]]

    def expected(self, ids, steered, image=True):
        """log p of each token after the first; `steered` flags who is shifted."""
        terms = [Term(self.shift, range(len(self.shift)), steered)]
        pixels = self.processor.image_processor(IMAGE, return_tensors="pt")["pixel_values"]
        inputs = {"pixel_values": pixels} if image else {}
        blocks = self.model.model.language_model.layers
        with shifted(blocks, terms), torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), **inputs).logits[0, :-1]
        return chosen_logprobs(logits, ids)


@pytest.fixture(scope="module")
def world(vision):
    return World(vision)


def chat(world, model="tiny", image=True, **more):
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}] if image else []
    return world.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}],
        temperature=0,
        **{"max_tokens": 4, **more},
    )


def asked(**steering):
    return {
        "logprobs": True,
        "extra_body": {
            "vllm_xargs": steering,
            "prompt_logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        },
    }


def receipt(answer):
    return (answer.model_extra or {}).get("grains")


CASES = [
    ("tiny", {}, None),
    ("tiny:faithful", {}, "text"),
    ("tiny", {"steering": "faithful", "steering_positions": "image"}, "image"),
    ("tiny:faithful", {"steering_positions": "all"}, "all"),
]


@pytest.mark.parametrize(("model", "steering", "positions"), CASES)
@pytest.mark.parametrize("image", [True, False])
def test_served_logprobs_equal_transformers(world, model, steering, positions, image):
    answer = chat(world, model, image, **asked(**steering))
    prompt = answer.prompt_token_ids
    assert prompt == world.ids(image)
    (choice,) = answer.choices
    ids = prompt + choice.token_ids
    held = torch.tensor(ids) == world.image_token
    held[len(prompt) :] = False  # A random model may well say the word `<image>`.
    assert bool(held.any()) == image
    where = {None: held & ~held, "all": held | ~held, "text": ~held, "image": held}[positions]
    found = [next(iter(step.values()))["logprob"] for step in answer.prompt_logprobs[1:]]
    found += [token.logprob for token in choice.logprobs.content]
    expected = world.expected(ids, where, image)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    facts = receipt(answer)
    if positions is None:
        assert facts is None
        return
    fed = len(choice.token_ids) - 1
    assert facts["vectors"][0]["positions"] == positions
    assert facts["prompt_tokens"] == int(where[: len(prompt)].sum())
    assert facts["generated_tokens"] == (0 if positions == "image" else fed)


def test_the_reference_can_tell_positions_apart(world):
    ids = world.ids()
    held = torch.tensor(ids) == world.image_token
    results = [world.expected(ids, where) for where in (held & ~held, held, ~held, held | ~held)]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize(("model", "steering", "positions"), CASES)
def test_streams_carry_the_same_receipt(world, model, steering, positions):
    whole = receipt(chat(world, model, **asked(**steering)))
    chunks = list(chat(world, model, stream=True, **asked(**steering)))
    found = [facts for chunk in chunks if (facts := receipt(chunk))]
    assert (found[-1:] or [None]) == [whole]
    assert (whole is None) == (positions is None)


@pytest.mark.parametrize("places", ["picture", "text+generation", "image:3", "prompt+image"])
@pytest.mark.parametrize("stream", [False, True])
def test_other_positions_are_refused(world, places, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(world, "tiny:faithful", stream=stream, **asked(steering_positions=places))
    message = str(refused.value)
    assert "steering_positions" in message and "is not one of all, text, image, prompt" in message


def test_the_border_is_of_no_use_to_kinds_of_tokens(world):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(world, "tiny:faithful", **asked(steering_prompt_tokens=3))
    assert "of no use with steering_positions 'all', 'text' and 'image'" in str(refused.value)
