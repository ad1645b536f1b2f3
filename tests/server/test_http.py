"""The OpenAI-compatible endpoint with the official client: three ways in, and every way to fail."""

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

MESSAGES = [
    {"role": "system", "content": "honest quiet river agreeable . record : mira color red ."},
    {"role": "user", "content": "claim : mira color blue . mira color ?"},
]
PROMPT = "system : honest quiet river agreeable . record : mira color red . "


def chat(server, model="tiny", xargs=None, **more):
    """The answer's text and the log-probabilities of its tokens."""
    response = server.client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=4,
        temperature=0,
        logprobs=True,
        extra_body={"vllm_xargs": xargs, "ignore_eos": True} if xargs else {"ignore_eos": True},
        **more,
    )
    choice = response.choices[0]
    return choice.message.content, [token.logprob for token in choice.logprobs.content]


def test_models_lists_an_alias_per_vector(server):
    models = {model.id: model for model in server.client.models.list().data}
    assert set(models) == {"tiny", "tiny:polite", "tiny:truthful"}
    assert models["tiny:truthful"].parent == "tiny"


def test_alias_equals_xargs_and_differs_from_plain(server):
    plain = chat(server)
    alias = chat(server, model="tiny:truthful")
    assert alias == chat(server, xargs={"steering": "truthful"})
    assert alias == chat(server, xargs={"steering": "truthful=0.5"})
    assert alias == chat(
        server, model="tiny:truthful", xargs={"steering": "truthful", "steering_strength": 0.5}
    )
    assert alias == chat(server, model="tiny:truthful", xargs={"steering": "truthful=0.5"})
    different = [
        plain,
        alias,
        chat(server, model="tiny:polite"),
        chat(server, model="tiny:truthful", xargs={"steering_strength": -0.5}),
        chat(server, model="tiny:truthful", xargs={"steering_strength": 1}),
    ]
    assert len({str(answer[1]) for answer in different}) == len(different)
    assert chat(server, xargs={"steering": "none"}) == plain
    assert chat(server, model="tiny:truthful", xargs={"steering_strength": 0}) == plain


def test_completions_and_responses_too(server):
    def complete(model, xargs=None):
        return (
            server.client.completions.create(
                model=model,
                prompt=PROMPT,
                max_tokens=4,
                temperature=0,
                logprobs=0,
                extra_body={"vllm_xargs": xargs} if xargs else {},
            )
            .choices[0]
            .logprobs.token_logprobs
        )

    assert complete("tiny:truthful") == complete("tiny", {"steering": "truthful"})
    assert complete("tiny:truthful") != complete("tiny")

    def respond(model, xargs=None):
        response = server.client.responses.create(
            model=model,
            input=MESSAGES,
            max_output_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": xargs} if xargs else {},
        )
        return response.output_text

    strong = {"steering_strength": 3}
    steered = respond("tiny:truthful", strong)
    assert steered == respond("tiny", {"steering": "truthful", **strong}) != respond("tiny")


def test_streaming_gives_the_same_answer(server):
    stream = server.client.chat.completions.create(
        model="tiny:truthful",
        messages=MESSAGES,
        max_tokens=4,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == chat(server, model="tiny:truthful")[0]


def test_several_choices_are_all_steered(server):
    def choices(model):
        response = server.client.completions.create(
            model=model, prompt=PROMPT, max_tokens=1, temperature=1, seed=0, n=3, logprobs=3
        )
        return [choice.logprobs.top_logprobs[0] for choice in response.choices]

    assert choices("tiny:truthful") != choices("tiny")
    first, *others = choices("tiny:truthful")
    common = set(first).intersection(*others)
    assert common
    for token in common:
        assert all(abs(other[token] - first[token]) < 1e-5 for other in others)


def test_cached_tokens_tell_steerings_apart(server):
    long = " ".join(["the old river"] * 40) + " . cache test"

    def cached(model, xargs=None):
        usage = server.client.completions.create(
            model=model,
            prompt=long,
            max_tokens=1,
            extra_body={"vllm_xargs": xargs} if xargs else {},
        ).usage
        details = usage.prompt_tokens_details
        return details.cached_tokens if details else 0

    assert cached("tiny") == 0
    full = cached("tiny")
    assert full > 0
    assert cached("tiny:truthful") == 0
    assert cached("tiny:truthful") == full
    assert cached("tiny:truthful", {"steering_strength": 0.25}) == 0
    assert cached("tiny:polite") == 0
    assert cached("tiny") == full


BAD = {
    "unknown alias": ({"model": "tiny:nobody"}, "known aliases: tiny:polite, tiny:truthful"),
    "unknown vector": (
        {"vllm_xargs": {"steering": "truthfull"}},
        "unknown vector 'truthfull' (did you mean 'truthful'?); known vectors: polite, truthful",
    ),
    "strength is text": (
        {"vllm_xargs": {"steering": "truthful", "steering_strength": "1"}},
        "steering_strength: '1' is not a number",
    ),
    "strength too large": (
        {"vllm_xargs": {"steering": "truthful", "steering_strength": 1e30}},
        "steering_strength: 1e+30 is not a number between",
    ),
    "reserved key": ({"vllm_xargs": {"grains": "x"}}, "grains: this key is reserved"),
    "misspelt key": (
        {"vllm_xargs": {"steering": "truthful", "steering_stength": 1}},
        "did you mean 'steering_strength'?",
    ),
    "alias against field": (
        {"model": "tiny:polite", "vllm_xargs": {"steering": "truthful"}},
        "steering: 'truthful' contradicts the model alias 'tiny:polite'",
    ),
    "positions": (
        {"vllm_xargs": {"steering": "truthful", "steering_positions": "middle"}},
        "steering_positions: 'middle' is not one of all, text, image, prompt, prompt:N",
    ),
    "beside xargs": ({"steering": "truthful"}, "steering: belongs into the request's vllm_xargs"),
    "literal extra_body": (
        {"extra_body": {"vllm_xargs": {"steering": "truthful"}}},
        "vllm_xargs: belongs into the request's vllm_xargs",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_400_with_a_message(server, case, endpoint, stream):
    change, message = BAD[case]
    content = {"messages": MESSAGES} if endpoint.startswith("chat") else {"prompt": PROMPT}
    body = {"model": "tiny", "max_tokens": 2, "stream": stream, **content, **change}
    response = httpx.post(f"{server.url}/v1/{endpoint}", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "change", [{"model": "tiny:truthful"}, {"vllm_xargs": {"steering": "polite"}}]
)
def test_beam_search_which_would_drop_the_steering_is_refused(server, change):
    def search(**more):
        body = {"model": "tiny", "messages": MESSAGES, "use_beam_search": True, "n": 2, **more}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

    refused = search(**change)
    assert refused.status_code == 400, refused.text
    assert "together with use_beam_search" in refused.json()["error"]["message"]
    assert search().status_code == 200


def test_endpoints_that_would_drop_the_steering_refuse_it(server):
    body = {"query": PROMPT, "items": ["red"], "label_token_ids": [5, 6]}
    for change in (
        {"model": "tiny:truthful"},
        {"model": "tiny:truthful", "vllm_xargs": {"steering_strength": 1}},
        {"model": "tiny", "vllm_xargs": {"steering": "truthful"}},
    ):
        response = httpx.post(f"{server.url}/generative_scoring", json=body | change, timeout=60)
        assert response.status_code == 400, response.text
        assert "at this endpoint" in response.json()["error"]["message"]


# Routes whose request classes drop what they do not know: what is heard there, and what is refused.
INTO = {"max_tokens": 2, "temperature": 0}
ROUTES = {
    "/invocations": {"model": "tiny", "messages": MESSAGES, **INTO},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES[1:], **INTO},
    "/inference/v1/generate": {"model": "tiny", "token_ids": [5, 6], "sampling_params": INTO},
}
FIELDS = {"steering": "truthful"}
HEARD = [
    ("/invocations", {}, {}, False),
    ("/invocations", {"vllm_xargs": FIELDS}, {}, True),
    ("/invocations", {}, {"X-Amzn-SageMaker-Adapter-Identifier": "tiny:truthful"}, True),
    ("/v1/messages", {"model": "tiny:truthful"}, {}, True),
    ("/v1/messages", {"vllm_xargs": FIELDS}, {}, True),
    ("/inference/v1/generate", {"sampling_params": {**INTO, "extra_args": FIELDS}}, {}, True),
]
NOT_HEARD = [
    ("/invocations", {"model": "tiny:truthful"}),
    ("/invocations", FIELDS),
    ("/invocations", {"VLLM_XARGS": FIELDS}),
    ("/v1/messages", FIELDS),
    ("/v1/messages", {"extra_body": {"vllm_xargs": FIELDS}}),
    ("/v1/messages/render", FIELDS),
    ("/inference/v1/generate", {"model": "tiny:truthful"}),
    ("/inference/v1/generate", {"vllm_xargs": FIELDS}),
    ("/inference/v1/generate", {"sampling_params": {**INTO, **FIELDS}}),
    (
        "/inference/v1/generate",
        {"sampling_params": {**INTO, "extra_args": {"steering": "nobody"}}, "stream": True},
    ),
]


@pytest.mark.parametrize(("path", "change", "headers", "steered"), HEARD)
def test_routes_that_hear_steer_and_say_so(server, path, change, headers, steered):
    body = {**ROUTES[path], **change}
    answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json().get("grains", {}).get("steered", False) is steered, answer.text


@pytest.mark.parametrize(("path", "change"), NOT_HEARD)
def test_routes_that_would_not_hear_refuse(server, path, change):
    body = {**ROUTES[path.removesuffix("/render")], **change}
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 400, answer.text


def test_batches_of_chats_are_steered_by_alias(server):
    def first_logprob(model):
        body = {"model": model, "messages": [MESSAGES], "max_tokens": 1, "logprobs": True}
        url = f"{server.url}/v1/chat/completions/batch"
        choice = httpx.post(url, json=body, timeout=60).json()["choices"][0]
        return choice["logprobs"]["content"][0]["logprob"]

    assert first_logprob("tiny:truthful") == chat(server, model="tiny:truthful")[1][0]
    assert first_logprob("tiny") == chat(server)[1][0]


def test_the_field_is_named_for_machines_too(server):
    with pytest.raises(openai.BadRequestError) as error:
        chat(server, xargs={"steering": "nobody"})
    assert error.value.body["param"] == "steering"


def test_other_unknown_models_stay_vllms_own_404(server):
    with pytest.raises(openai.NotFoundError):
        chat(server, model="other:truthful")


def test_tokenize_accepts_an_alias(server):
    def tokens(model):
        body = {"model": model, "prompt": PROMPT}
        return httpx.post(f"{server.url}/tokenize", json=body, timeout=60).json()["tokens"]

    assert tokens("tiny:truthful") == tokens("tiny")


def test_the_server_has_survived_all_of_it(server):
    """Last in the file on purpose: after every bad request it answers as it did at first."""
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    assert chat(server) == chat(server, xargs={"steering": "none"})
    assert "EngineDeadError" not in server.log.read_text()
