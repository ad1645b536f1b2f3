"""Model names that are aliases, what the canary throws its dice on, what a prompt holds."""

from contextvars import copy_context
from types import SimpleNamespace

import pytest
import torch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams

from grains_vllm.frontend import (
    _check_request,
    _held,
    _identity,
    _process_inputs,
    _resolve_alias,
)
from grains_vllm.receipts import in_beam_search
from grains_vllm.registry import Snapshot
from grains_vllm.selection import SelectionError


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


@pytest.mark.parametrize(("output", "said"), [({}, None), ({"layer_output": "sum"}, "unchecked")])
def test_a_marker_says_what_nobody_has_checked(catalogue, output, said):
    snapshot = Snapshot(catalogue(**output), True)
    processor = SimpleNamespace(grains_registry=SimpleNamespace(snapshot=lambda: snapshot))
    params = SamplingParams(extra_args={"steering": "truthful"})
    made = SimpleNamespace(
        sampling_params=params, prompt_token_ids=[1, 2], prompt_embeds=None, mm_features=None
    )
    _process_inputs(lambda *_: made)(processor, "1", None, params)
    assert params.extra_args["grains"].get("layer_output") == said


@pytest.mark.parametrize("asked", [True, False])
def test_a_beam_search_is_known_by_its_request(catalogue, asked):
    request = ChatCompletionRequest(messages=[], model="tiny", use_beam_search=asked)
    context = copy_context()
    context.run(_check_request, request, Snapshot(catalogue(), True))
    assert context.get(in_beam_search, False) is asked
