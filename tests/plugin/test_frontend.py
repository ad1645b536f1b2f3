"""Both gates: model names that are aliases, what a request holds, and what happens between them."""

import asyncio
import time
from contextvars import copy_context
from types import SimpleNamespace

import pytest
import torch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams

from grains_vllm import doors, frontend
from grains_vllm.frontend import _check_request, _held, _identity, _resolve_alias
from grains_vllm.receipts import in_beam_search
from grains_vllm.registry import Registry, Snapshot, _Memory
from grains_vllm.selection import RESERVED, SelectionError


def resolved(catalogue, model, xargs=None, adapters=("law", "tiny:polite", "tiny:other")):
    request = ChatCompletionRequest(messages=[], model=model, vllm_xargs=xargs)
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="tiny"), SimpleNamespace(name="tiny:v2")],
        lora_requests=dict.fromkeys(adapters),
    )
    _resolve_alias(request, models, catalogue())
    return request.model, (request.vllm_xargs or {}).get("steering")


@pytest.mark.parametrize(
    ("model", "xargs", "expected"),
    [
        ("tiny", None, ("tiny", None)),
        ("tiny:truthful", None, ("tiny", "truthful")),
        ("tiny:v2", None, ("tiny:v2", None)),
        ("tiny:v2:truthful", None, ("tiny:v2", "truthful")),
        ("law:truthful", None, ("law", "truthful")),
        ("tiny:other", None, ("tiny:other", None)),  # an adapter that looks like an alias
        ("unknown:truthful", None, ("unknown:truthful", None)),  # vLLM's own 404
        ("tiny:truthful", {"steering": "truthful=2"}, ("tiny", "truthful=2")),
        ("tiny:truthful", {"steering": "polite=1, truthful"}, ("tiny", "polite=1, truthful")),
    ],
)
def test_aliases(catalogue, model, xargs, expected):
    assert resolved(catalogue, model, xargs) == expected


@pytest.mark.parametrize(
    ("model", "xargs", "message"),
    [
        ("tiny:nobody", None, "unknown alias 'tiny:nobody'; known aliases: tiny:polite, tiny:tru"),
        ("tiny:truthfull", None, r"'tiny:truthfull' \(did you mean 'tiny:truthful'\?\); known"),
        ("law:nobody", None, "known aliases: law:polite, law:truthful"),
        ("tiny:polite", None, "is a LoRA adapter and the alias of a vector"),
        ("tiny:truthful", {"steering": "polite"}, "'polite' contradicts the model alias"),
        ("tiny:truthful", {"steering": "none"}, "'none' contradicts the model alias"),
    ],
)
def test_refused_aliases(catalogue, model, xargs, message):
    with pytest.raises(SelectionError, match=message):
        resolved(catalogue, model, xargs)


@pytest.mark.parametrize(
    ("request_id", "identity"),
    [
        # vLLM numbers the prompts of one request to /v1/completions.
        ("cmpl-8f3a-0", "cmpl-8f3a"),
        ("cmpl-8f3a-12", "cmpl-8f3a"),
        ("cmpl-my-own-7-1", "cmpl-my-own-7"),
        ("chatcmpl-my-own-7", "chatcmpl-my-own-7"),
        ("17", "17"),
    ],
)
def test_prompts_of_one_request_are_one(request_id, identity):
    assert _identity(request_id) == identity


def test_what_a_prompt_holds_besides_text():
    """Gemma's line breaks lie in an image's place and hold nothing; Qwen's videos are no images."""
    holds = torch.tensor([False, True, True, False, True])
    places = [
        ("image", PlaceholderRange(3, 5, is_embed=holds)),
        ("video", PlaceholderRange(10, 2)),
    ]
    features = [MultiModalFeatureSpec(None, kind, "id", place) for kind, place in places]
    request = SimpleNamespace(mm_features=features)
    assert list(_held(request)) == [("image", 4, 6), ("image", 7, 8), ("video", 10, 12)]
    assert list(_held(SimpleNamespace(mm_features=None))) == []


class Gates:
    """The two gates of one front end, around stand-ins for what vLLM does behind them."""

    def __init__(self, catalogue):
        self.registry = Registry(_Memory(Snapshot(catalogue, enabled=True)))
        self.grains_registry = self.registry
        self.create_error_response = BaseServing.create_error_response
        self.models = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name="tiny")], lora_requests={}, input_processor=self
        )

    async def first(self, **body):
        async def accept(_, request):
            return None

        request = ChatCompletionRequest(messages=[], **body)
        return await frontend._check_model(accept)(self, request)

    def second(self, extra_args=None):
        def build(_, request_id, prompt, params):
            return SimpleNamespace(
                sampling_params=params,
                mm_features=None,
                prompt_token_ids=[5, 6],
                prompt_embeds=None,
            )

        params = SamplingParams(extra_args=extra_args)
        request = frontend._process_inputs(build)(self, "1", "x", params)
        return request.sampling_params.extra_args.get(RESERVED)


STEERED = {"steering": "truthful"}


@pytest.mark.parametrize("late", [False, True])
def test_who_has_entered_is_steered_though_steering_is_switched_off(catalogue, monkeypatch, late):
    """A refusal at the second gate would be a 400, and in a stream come after a 200."""

    async def ask():
        gates = Gates(catalogue())
        assert await gates.first(vllm_xargs=STEERED) is None
        gates.registry.set_enabled(False)
        if late:
            now = time.monotonic() + 60
            monkeypatch.setattr(frontend.time, "monotonic", lambda: now)
        assert gates.second(STEERED)["terms"][0]["name"] == "truthful"
        refused = await gates.first(vllm_xargs=STEERED)
        assert (refused.error.code, refused.error.param) == (503, "steering")

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("top", "extra_args", "message"),
    [
        ({}, STEERED, "steering: '/v9/think' is no endpoint where steering has been compared"),
        ({}, {"steering": "none"}, "steering: '/v9/think' is no endpoint"),
        ({"default": "truthful"}, None, "the server's default steering: '/v9/think' is no"),
        ({"canary": {"name": "truthful", "fraction": 0.0}}, None, "the server's canary steering"),
    ],
)
def test_an_endpoint_that_nobody_knows_takes_no_steering(catalogue, top, extra_args, message):
    token = doors.undecided.set("/v9/think")
    try:
        with pytest.raises(VLLMValidationError, match=message):
            Gates(catalogue(**top)).second(extra_args)
        assert Gates(catalogue()).second() is None
    finally:
        doors.undecided.reset(token)


def test_an_error_shows_a_few_of_many_vectors(catalogue):
    names = [f"v{number:03}" for number in range(323)]
    many = catalogue({name: {"path": "one.safetensors", "strength": 1} for name in names})
    alias = asyncio.run(Gates(many).first(model="tiny:v3177"))
    field = asyncio.run(Gates(many).first(vllm_xargs={"steering": "v3177"}))
    for refused in (alias, field):
        assert "v317, " in refused.error.message
        assert refused.error.message.endswith("and 315 more (GET /v1/models lists them)")
        assert len(refused.error.message) < 300


@pytest.mark.parametrize(("output", "said"), [({}, None), ({"layer_output": "sum"}, "unchecked")])
def test_a_marker_says_what_nobody_has_checked(catalogue, output, said):
    assert Gates(catalogue(**output)).second(STEERED).get("layer_output") == said


@pytest.mark.parametrize("asked", [True, False])
def test_a_beam_search_is_known_by_its_request(catalogue, asked):
    request = ChatCompletionRequest(messages=[], model="tiny", use_beam_search=asked)
    context = copy_context()
    context.run(_check_request, request, Snapshot(catalogue(), True))
    assert context.get(in_beam_search, False) is asked


CHATS = [[{"role": "user", "content": "x"}]]


@pytest.mark.parametrize("value", ["steering=truthful", ["steering"], 5, 0, ""])
def test_fields_that_are_no_mapping(catalogue, value):
    """Of classes that keep `vllm_xargs` among keys that they do not know."""
    request = BatchChatCompletionRequest(messages=CHATS, model="tiny", vllm_xargs=value)
    with pytest.raises(SelectionError, match=r"vllm_xargs: .* is not a mapping of fields"):
        _check_request(request, Snapshot(catalogue(), True))


def test_a_strength_beside_its_place(catalogue):
    asked = asyncio.run(Gates(catalogue()).first(model="tiny:truthful", strength=9))
    assert asked.error.message == "strength: say steering_strength in vllm_xargs"
    assert asyncio.run(Gates(catalogue()).first(model="tiny", strength=9)) is None
