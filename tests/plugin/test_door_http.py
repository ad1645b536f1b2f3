"""Endpoints that drop unknown fields must not drop ours; around real request classes of vLLM."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

from grains_vllm import door_http

GENERATE = {"model": "tiny", "token_ids": [5, 6], "sampling_params": {"max_tokens": 1}}
MESSAGES = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def client():
    app = FastAPI()
    app.add_middleware(door_http.DoorMiddleware)

    @app.post("/inference/v1/generate")
    async def generate(request: GenerateRequest):
        return {"tokens": request.token_ids}

    @app.post("/v1/messages")
    async def messages(request: AnthropicMessagesRequest):
        return {"hears": "vllm_xargs" in type(request).model_fields}

    return TestClient(app)


@pytest.mark.parametrize(
    "field", [{"vllm_xargs": {"steering": "a"}}, {"steering": "a"}, {"steering_strength": 1}]
)
def test_fields_that_would_be_dropped_are_refused(client, field):
    answer = client.post("/inference/v1/generate", json=GENERATE | field)
    (name,) = field
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["message"].startswith(f"{name}: would be ignored at this endp")


def test_other_requests_pass_whole(client):
    tokens = list(range(100_000))  # a body in several messages
    answer = client.post("/inference/v1/generate", json={**GENERATE, "token_ids": tokens})
    assert answer.json() == {"tokens": tokens}
    assert client.post("/inference/v1/generate", content=b"{").status_code == 422
    assert client.post("/inference/v1/generate", json=["steering"]).status_code == 422


@pytest.mark.parametrize("hears", [True, False])
def test_messages_are_refused_where_this_vllm_drops_the_field(client, monkeypatch, hears):
    monkeypatch.setattr(door_http, "_messages_hear", lambda: hears)
    answer = client.post("/v1/messages", json={**MESSAGES, "vllm_xargs": {"steering": "a"}})
    assert answer.status_code == (200 if hears else 400), answer.text
