"""Endpoints that drop what they do not know must not drop steering; around vLLM's own classes."""

from types import SimpleNamespace

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

from grains_vllm import doors
from grains_vllm.door_http import DoorMiddleware
from grains_vllm.registry import Registry, Snapshot, _Memory

GENERATE = {"model": "tiny", "token_ids": [5, 6], "sampling_params": {"max_tokens": 1}}
MESSAGES = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
NEW = "/v9/think"


@pytest.fixture
def client(catalogue):
    app = FastAPI()
    app.add_middleware(DoorMiddleware)
    registry = Registry(_Memory(Snapshot(catalogue(), enabled=True)))
    app.state.openai_serving_models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="tiny")],
        lora_requests={},
        input_processor=SimpleNamespace(grains_registry=registry),
    )

    @app.post("/inference/v1/generate")
    async def generate(request: GenerateRequest):
        return {"tokens": request.token_ids}

    @app.post("/v1/messages")
    async def messages(request: AnthropicMessagesRequest):
        return {"hears": "vllm_xargs" in type(request).model_fields}

    @app.api_route(NEW, methods=["GET", "POST"])
    @app.post("/invocations")
    @app.post("/v1/completions")
    async def other():
        return {"undecided": doors.undecided.get()}

    @app.websocket(NEW)
    async def socket(socket: WebSocket):
        await socket.accept()
        await socket.send_json(doors.undecided.get())

    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/inference/v1/generate", {"vllm_xargs": {"steering": "a"}}, "vllm_xargs"),
        ("/inference/v1/generate", {"steering": "a"}, "steering"),
        ("/inference/v1/generate", {"sampling_params": {"steering": "a"}}, "steering"),
        ("/inference/v1/generate", {"sampling_params": {"vllm_xargs": {}}}, "vllm_xargs"),
        ("/inference/v1/generate", {"extra_args": {"steering_layers": 1}}, "steering_layers"),
        ("/inference/v1/generate", {"extra_body": {"vllm_xargs": {}}}, "vllm_xargs"),
        ("/v1/messages", {"steering": "none"}, "steering"),
        ("/v1/messages", {"vllm_xarg": {"steering": "a"}}, "vllm_xarg"),
        ("/v1/messages", {"extra_body": {"vllm_xargs": {"steering": "a"}}}, "vllm_xargs"),
        ("/v1/messages/render", {"steering": "a"}, "steering"),
        ("/invocations", {"model": "tiny:truthful"}, "model"),
        ("/invocations", {"model": "tiny:nobody"}, "model"),
        (NEW, {"model": "tiny:truthful"}, "model"),
        (NEW, {"vllm_xargs": {}}, "vllm_xargs"),
        (NEW, {"sampling_params": {"extra_args": {"steering": "none"}}}, "steering"),
    ],
)
def test_what_would_be_dropped_is_refused(client, path, body, param):
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"steering": "a"}}}),
        ("/v1/messages", {"vllm_xargs": {"steering": "a"}}),
        ("/v1/messages", {"model": "tiny:truthful"}),  # frontend.py knows what to do with it
        ("/invocations", {"model": "tiny"}),
        ("/invocations", {"vllm_xargs": {"steering": "a"}}),
        (NEW, {"model": "tiny", "prompt": "steering"}),
        (NEW, ["steering"]),
    ],
)
def test_what_is_heard_passes(client, path, body):
    if path in ("/inference/v1/generate", "/v1/messages"):
        body = (GENERATE if path.endswith("generate") else MESSAGES) | body
    assert client.post(path, json=body).status_code == 200


def test_other_requests_pass_whole(client):
    tokens = list(range(100_000))  # a body in several messages
    answer = client.post("/inference/v1/generate", json={**GENERATE, "token_ids": tokens})
    assert answer.json() == {"tokens": tokens}
    assert client.post("/inference/v1/generate", content=b"{").status_code == 422
    assert client.post("/inference/v1/generate", json=["steering"]).status_code == 422


def test_a_form_of_an_unknown_endpoint_names_no_steering(client):
    assert client.post(NEW, data={"model": "tiny"}).status_code == 200
    assert client.post(NEW, data={"Steering": "truthful"}).status_code == 400


def test_the_second_gate_is_told_of_unknown_endpoints(client):
    assert client.post(NEW, json={}).json() == {"undecided": NEW}
    assert client.get(NEW).json() == {"undecided": NEW}
    assert client.post("/v1/completions", json={}).json() == {"undecided": None}
    with client.websocket_connect(NEW) as socket:
        assert socket.receive_json() == NEW
    below = TestClient(client.app, root_path="/behind/a/proxy")
    assert below.post("/behind/a/proxy/v1/completions", json={}).json() == {"undecided": None}


@pytest.mark.parametrize("hears", [True, False])
def test_messages_are_refused_where_this_vllm_drops_the_field(client, monkeypatch, hears):
    monkeypatch.setattr(doors, "_messages_know_xargs", lambda: hears)
    answer = client.post("/v1/messages", json={**MESSAGES, "vllm_xargs": {"steering": "a"}})
    assert answer.status_code == (200 if hears else 400), answer.text
