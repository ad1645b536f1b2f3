"""Counts against brute force, vLLM's own output processor, and responses on their way out."""

import asyncio
import json
import random
import time
from itertools import pairwise

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)
from vllm.v1.engine.parallel_sampling import ParentRequest

from grains_vllm import receipts
from grains_vllm.positions import Positions
from grains_vllm.receipts import Receipt, combined
from grains_vllm.receipts_http import ReceiptMiddleware

POSITIONS = [
    "all",
    "text",
    "image",
    "prompt",
    "generation",
    "prompt:3",
    "generation:2",
    "prompt:2+generation:1",
]


def term(positions, border, name="truthful", strength=0.5, held=()):
    return {
        "key": "", "name": name, "vector": f"{name}{'0' * 64}", "layers": [1, 2],
        "scale": "relative", "slot": "", "strength": strength, "positions": positions,
        "spans": Positions.parse(positions).spans(border, held),
    }  # fmt: skip


def marker(*terms, source="request", **more):
    return {"terms": list(terms), "digest": "", "prompt_tokens": 0, "source": source, **more}


def receipt(decision, prompt_tokens, *lengths):
    whole = Receipt(decision, prompt_tokens, len(lengths))
    for index, length in enumerate(lengths):
        whole.begin(str(index), lambda length=length: length)
    return whole


def test_counts_agree_with_a_walk_over_all_positions():
    draw = random.Random(0)
    for _ in range(300):
        prompt, lengths = draw.randint(1, 8), [draw.randint(0, 6) for _ in range(2)]
        border = draw.randint(1, prompt)  # steering_prompt_tokens may say so
        chosen = draw.choices(POSITIONS, k=draw.randint(0, 3))
        begin = draw.randint(0, prompt)
        image = range(begin, draw.randint(begin, prompt))
        held = [("image", image.start, image.stop)]
        terms = [term(text, border, held=held) for text in chosen]
        whole = receipt(marker(*terms), prompt, *lengths)

        def walk(texts, prompt=prompt, lengths=lengths, border=border, image=image):
            def hit(position):
                return any(
                    (position in image) == (text == "image")
                    if text in ("image", "text")
                    else any(
                        position in range(start, 10**6 if end is None else end)
                        for start, end in Positions.parse(text).spans(border)
                    )
                    for text in texts
                )

            fed_back = [p for n in lengths for p in range(prompt, prompt + n - 1)]
            # Who left before the first token may never have been computed.
            return [sum(map(hit, range(prompt))) if any(lengths) else 0, sum(map(hit, fed_back))]

        facts = whole.to_json()
        assert [facts["prompt_tokens"], facts["generated_tokens"]] == walk(chosen)
        for text, vector in zip(chosen, facts["vectors"], strict=True):
            assert [vector["prompt_tokens"], vector["generated_tokens"]] == walk([text])


def test_the_form_of_a_receipt():
    assert receipt(marker(term("prompt:3", 5)), 5, 4).to_json() == {
        "steered": True,
        "source": "request",
        "vectors": [
            {
                "name": "truthful",
                "digest": "truthful0000",
                "strength": 0.5,
                "positions": "prompt:3",
                "layers": [1, 2],
                "prompt_tokens": 3,
                "generated_tokens": 0,
            }
        ],
        "prompt_tokens": 3,
        "generated_tokens": 0,
    }
    assert receipt(marker(source="canary", fraction=0.1), 5, 4).to_json() == {
        "steered": False,
        "source": "canary",
        "fraction": 0.1,
        "vectors": [],
        "prompt_tokens": 0,
        "generated_tokens": 0,
    }


def test_several_prompts_are_one_receipt():
    whole = combined([receipt(marker(term("all", 5)), 5, 4), receipt(marker(term("all", 7)), 7, 2)])
    assert whole["prompt_tokens"] == 12 and whole["generated_tokens"] == 4
    assert [vector["prompt_tokens"] for vector in whole["vectors"]] == [12]
    assert "parts" not in whole


def test_who_says_so_and_not_how_it_is_called_makes_a_step_of_a_beam_search(processor):
    shown = []
    for is_beam in (False, True):
        receipts.in_beam_search.set(is_beam)
        steps = []
        token = receipts.collected.set(steps)
        for number in range(2):
            # What a client may send as X-Request-Id ends up here.
            add(processor, marker(term("all", 5)), name=f"mine-{number}-beam-{is_beam}")
        receipts.collected.reset(token)
        shown.append(combined(steps)["prompt_tokens"])
    receipts.in_beam_search.set(False)
    assert shown == [0, None]


def test_an_engine_that_nobody_has_checked_says_so():
    unchecked = {"layer_output": "unchecked"}
    one, two = (receipt(marker(term("all", 5), **unchecked), 5, 4) for _ in range(2))
    assert one.to_json()["layer_output"] == combined([one, two])["layer_output"] == "unchecked"


def test_prompts_decided_differently_are_told_apart():
    dice = [
        receipt(marker(term("all", 5, "new"), source="canary", fraction=0.5), 5, 3),
        receipt(marker(term("all", 6, "old"), source="default", fraction=0.5), 6, 3),
        receipt(marker(term("all", 7, "new"), source="canary", fraction=0.5), 7, 3),
    ]
    whole = combined(dice)
    assert (whole["source"], whole["prompt_tokens"], whole["generated_tokens"]) == ("mixed", 18, 6)
    assert [
        (part["source"], part["prompts"], part["prompt_tokens"]) for part in whole["parts"]
    ] == [
        ("canary", 2, 12),
        ("default", 1, 6),
    ]
    assert {vector["name"]: vector["prompt_tokens"] for vector in whole["vectors"]} == {
        "new": 12,
        "old": 6,
    }


# vLLM's own bookkeeping, with the engine core's messages written by hand


@pytest.fixture
def processor(monkeypatch):
    for owner, wrappers in (
        (OutputProcessor, receipts.OUTPUT_PROCESSOR),
        (RequestState, receipts.REQUEST_STATE),
        (RequestOutput, receipts.REQUEST_OUTPUT),
    ):
        for name, make in wrappers.items():
            made = make(vars(owner).get(name))
            monkeypatch.setattr(owner, name, made, raising=False)
    return OutputProcessor(None, log_stats=False)


@pytest.fixture
def counted():
    """(requests admitted, requests finished, generated tokens) since the test began."""

    def now():
        label = {"vector": "counted"}
        return [
            REGISTRY.get_sample_value(f"grains:{name}_total", labels) or 0
            for name, labels in (
                ("requests", {**label, "source": "request"}),
                ("steered_prompt_tokens", label),
                ("steered_generation_tokens", label),
            )
        ]

    before = now()
    return lambda: [after - begun for after, begun in zip(now(), before, strict=True)]


PROMPT = list(range(10, 15))
KINDS = list(RequestOutputKind)


def add(processor, decision, n=1, kind=RequestOutputKind.FINAL_ONLY, queue=None, name="asked"):
    """Adds a request the way LLMEngine and AsyncLLM do; returns the ids of its sequences."""
    params = SamplingParams(
        n=n, output_kind=kind, detokenize=False, extra_args=decision and {"grains": decision}
    )

    def request(request_id, params):
        return EngineCoreRequest(
            request_id, PROMPT, None, params, None, 0.0, None, None, None, external_req_id=name
        )

    if n == 1:
        processor.add_request(request(f"{name}-1", params), None, None, 0, queue)
        return [f"{name}-1"]
    parent = ParentRequest(request(f"{name}-1", params))
    children = [parent.get_child_info(index) for index in range(n)]
    for index, (child, child_params) in enumerate(children):
        processor.add_request(request(child, child_params), None, parent, index, queue)
    return [child for child, _ in children]


def step(processor, *tokens, done=()):
    return processor.process_outputs(
        [
            EngineCoreOutput(
                sequence,
                [7] * count,
                finish_reason=FinishReason.LENGTH if sequence in done else None,
            )
            for sequence, count in tokens
        ]
    ).request_outputs


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_output_has_its_receipt(processor, counted, kind):
    (one,) = add(processor, marker(term("all", 5, "counted")), kind=kind)
    (plain,) = add(processor, None, kind=kind, name="plain")
    unfinished = step(processor, (one, 1), (plain, 1)) + step(processor, (one, 2), (plain, 2))
    assert all(output.grains is None for output in unfinished)
    by_name = {
        output.request_id: output.grains
        for output in step(processor, (one, 1), (plain, 1), done=(one, plain))
    }
    assert by_name["plain"] is None
    assert by_name["asked"] == receipt(marker(term("all", 5, "counted")), 5, 4).to_json()
    assert counted() == [1, 5, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_one_request_share_a_receipt(processor, counted, kind):
    one, two = add(processor, marker(term("all", 5, "counted")), n=2, kind=kind)
    early = step(processor, (one, 3), (two, 3), done=(one,))
    assert all(output.grains is None for output in early)
    assert counted() == [1, 0, 0]
    (last,) = step(processor, (two, 2), done=(two,))
    assert last.finished and len(last.outputs) == (2 if kind == RequestOutputKind.FINAL_ONLY else 1)
    facts = last.grains
    assert (facts["prompt_tokens"], facts["generated_tokens"]) == (5, 2 + 4)
    assert counted() == [1, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_reader_gets_the_receipt_too(processor, kind):
    queue = RequestOutputCollector(kind, "asked-1")
    (one,) = add(processor, marker(term("generation", 5)), kind=kind, queue=queue)
    step(processor, (one, 1))
    step(processor, (one, 2), done=(one,))
    assert queue.get_nowait().grains["generated_tokens"] == 2


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("internal", [True, False])
def test_an_aborted_request_is_counted_once(processor, counted, n, internal):
    sequences = add(processor, marker(term("all", 5, "counted")), n=n)
    step(processor, *((sequence, 3) for sequence in sequences))
    for _ in range(2):
        processor.abort_requests(["asked-1"] if internal else ["asked"], internal=internal)
    assert not processor.request_states
    assert counted() == [1, 5, 2 * n]
    assert not processor.grains_receipts


# HTTP


STREAM = [
    b'data: {"choices":[{"index":0,"delta":{"content":"a \\"finish_reason\\":\\"x\\""},'
    b'"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"\xc3\xa9"},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[{"index":1,"delta":{"content":"c"},"finish_reason":"length"}]}\n\n',
    b": keep-alive\n\n",
    b'data: {"choices":[],"usage":{"prompt_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
]
BODY = {"choices": [{"text": "é", "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}
RECEIPTS = Middleware(ReceiptMiddleware)
GZIP = Middleware(GZipMiddleware, minimum_size=0)
PATHS = ["/json", "/stream", "/text", "/refused", "/list", "/background", "/encoded"]


async def work(request, length=4):
    """Admits a request as an endpoint does: in a task of its own."""
    kept = receipt(marker(term("all", 5)), 5, length)

    async def admit():
        if "plain" not in request.query_params:
            receipts.collected.get().append(kept)

    await asyncio.create_task(admit())
    return kept


async def json_endpoint(request):
    (await work(request)).end("0")
    return JSONResponse(BODY)


async def background(request):
    await work(request)
    return JSONResponse({"status": "queued"})


async def text(request):
    (await work(request)).end("0")
    return PlainTextResponse('{"a": 1}')


async def refused(request):
    (await work(request)).end("0")
    return JSONResponse({"error": {"message": "no"}}, status_code=400)


async def listing(request):
    (await work(request)).end("0")
    return JSONResponse([1, 2])


async def encoded(request):
    """In an encoding that nobody here knows."""
    (await work(request)).end("0")
    return JSONResponse(BODY, headers={"content-encoding": "unknown"})


async def stream(request):
    async def events():
        first, second = await work(request), await work(request, 2)
        yield STREAM[0]
        first.end("0")
        yield STREAM[1]
        second.end("0")
        for event in STREAM[2:]:
            await asyncio.sleep(0.05)
            yield event

    return StreamingResponse(events(), media_type="text/event-stream")


def app(*middleware):
    endpoints = (json_endpoint, stream, text, refused, listing, background, encoded)
    routes = [Route(path, endpoint) for path, endpoint in zip(PATHS, endpoints, strict=True)]
    return Starlette(routes=routes, middleware=list(middleware))


def get(asked, path, **headers):
    async def ask():
        transport = httpx.ASGITransport(asked)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers={"accept-encoding": "identity", **headers})

    return asyncio.run(ask())


def test_a_json_response_ends_with_the_receipt():
    response = get(app(RECEIPTS), "/json")
    assert int(response.headers["content-length"]) == len(response.content)
    facts = response.json()
    assert list(facts) == [*BODY, "grains"]
    assert facts.pop("grains") == receipt(marker(term("all", 5)), 5, 4).to_json()
    assert facts == BODY


@pytest.mark.parametrize("path", PATHS)
def test_without_steering_no_byte_changes(path):
    plain, watched = (get(app(*kinds), f"{path}?plain") for kinds in ([], [RECEIPTS]))
    assert plain.content == watched.content and plain.headers == watched.headers


@pytest.mark.parametrize("path", ["/text", "/refused", "/list", "/background", "/encoded"])
def test_other_responses_are_left_alone(path):
    plain, watched = (
        get(app(*kinds), path + query) for kinds, query in (([], "?plain"), ([RECEIPTS], ""))
    )
    assert plain.content == watched.content and plain.headers == watched.headers


def test_a_compressing_middleware_goes_around_it():
    zipped = {"accept-encoding": "gzip"}
    inside = get(app(RECEIPTS, GZIP), "/json", **zipped)
    assert inside.headers["content-encoding"] == "gzip" and inside.json() == BODY
    around = get(app(GZIP, RECEIPTS), "/json", **zipped)
    assert around.headers["content-encoding"] == "gzip" and "grains" in around.json()


def test_a_stream_carries_the_receipt_where_its_last_answer_ends():
    arrived = []

    async def ask():
        async def send(message):
            if message["type"] == "http.response.body" and message["body"]:
                arrived.append((time.monotonic(), message["body"]))

        async def receive():
            await asyncio.sleep(60)

        scope = {"type": "http", "method": "GET", "path": "/stream", "query_string": b""}
        await app(RECEIPTS)(
            {**scope, "headers": [], "asgi": {"spec_version": "2.4"}}, receive, send
        )

    asyncio.run(ask())
    chunks = [body for _, body in arrived]
    assert chunks[:2] == STREAM[:2] and chunks[3:] == STREAM[3:]
    facts = json.loads(chunks[2].removeprefix(b"data: "))
    assert (facts["grains"]["prompt_tokens"], facts["grains"]["generated_tokens"]) == (10, 4)
    del facts["grains"]
    assert facts == json.loads(STREAM[2].removeprefix(b"data: "))
    # Nothing is held back: the events keep the distance that they were sent with.
    times = [when for when, _ in arrived]
    assert all(later - earlier > 0.03 for earlier, later in pairwise(times[1:]))


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        (b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":3}}', True),
        (b'data: {"type":"message-end","delta":{"finish_reason":"COMPLETE"}}', True),
        (b'event: message_stop\ndata: {"type":"message_stop"}', False),
        (b'data: {"error":{"message":"no","finish_reason":"error"}}', False),
        (b'data: {"type":"x","note":"event: message_delta\\n"}', False),
        (b'data: {"finish_reason":"not JSON', False),
    ],
)
def test_where_other_streams_carry_it(event, ends):
    async def events(request):
        (await work(request)).end("0")
        return StreamingResponse(iter([event + b"\n\n"]), media_type="text/event-stream")

    asked = Starlette(routes=[Route("/", events)], middleware=[RECEIPTS])
    content = get(asked, "/").content
    if not ends:
        assert content == event + b"\n\n"
        return
    head, data = content.split(b"data: ")
    assert head == event.split(b"data: ")[0] and content.endswith(b"}\n\n")
    assert "grains" in json.loads(data)
