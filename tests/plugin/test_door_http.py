"""Endpoints that drop what they do not know must not drop steering; around vLLM's own classes."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from grains_vllm import doors
from grains_vllm.door_http import DoorMiddleware
from grains_vllm.frontend import _checked_by
from grains_vllm.receipts import in_beam_search
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
    @app.post("/v1/messages/render")
    @app.post("/v1/responses/compact")
    @app.post("/invocations")
    @app.post("/v1/completions")
    async def other(request: Request):
        if request.method == "POST":
            await request.body()
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
        ("/v1/responses/compact", {"model": "tiny:truthful"}, "model"),
        (NEW, {"model": "tiny:truthful"}, "model"),
        (NEW, {"vllm_xargs": {}}, "vllm_xargs"),
        (NEW, {"sampling_params": {"extra_args": {"steering": "none"}}}, "steering"),
    ],
)
def test_what_would_be_dropped_is_refused(client, path, body, param):
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and answer.json()["type"] == "error"
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
    for form in ({"Steering": "truthful"}, {"model": "tiny:truthful"}):
        assert client.post(NEW, data=form).status_code == 400
    coded = client.post(NEW, content=b"%73teering=truthful")
    assert coded.status_code == 400 and coded.json()["error"]["param"] == "steering"


def test_who_has_no_key_is_asked_for_it_before_anything_is_read(client):
    """vLLM puts its own middleware inside ours, which must not read what it would not."""
    inner = FastAPI()
    inner.state.openai_serving_models = client.app.state.openai_serving_models
    inner.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    inner.add_middleware(DoorMiddleware)
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b'{"model": "tiny:nobody"}', "more_body": False}

    async def ask(path):
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": headers,
            "root_path": "",
        }
        await inner({**scope, "query_string": b"", "http_version": "1.1"}, receive, send)
        return sent[0]["status"]

    for path in ("/v1/messages", "/v1/nowhere"):
        assert (asyncio.run(ask(path)), read) == (401, [])


def test_an_endpoint_that_dies_of_a_refusal_is_answered_all_the_same(client):
    """Nobody turns the exception into an answer there."""

    @client.app.post("/v9/raw")
    async def raw(request: Request):
        await request.body()

    answer = client.post("/v9/raw", json={"steering": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering")


def test_a_request_knows_nothing_of_the_one_before_it():
    """A server may start it in the context of another one on the same connection."""
    seen = []

    async def app(scope, receive, send):
        seen.append((_checked_by.get(), in_beam_search.get()))
        in_beam_search.set(True)

    async def two():
        door = DoorMiddleware(app)
        for _ in range(2):
            await door({"type": "http", "method": "GET", "path": "/health"}, None, None)

    asyncio.run(two())
    assert seen == [(None, False)] * 2


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
