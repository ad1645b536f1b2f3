"""Model names that are aliases, and what the canary throws its dice on."""

from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from grains_vllm.frontend import _identity, _resolve_alias
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
