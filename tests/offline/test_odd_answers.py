"""Every part of every answer replaced by something else: nothing but a message comes of it."""

import json
from types import SimpleNamespace

import httpx
import pytest

from offline.console import progress
from offline.endpoint import Endpoint
from offline.endpoint_scorer import EndpointScorer
from offline.errors import InputError
from offline.evaluation import target as targets
from offline.evaluation.answers import Answers, Prompt
from offline.evaluation.chats import prompt_tokens, score_answers
from offline.evaluation.judge import Judge, Rubric
from offline.evaluation.target import Setting, Target, connect
from offline.pairs import Pair
from offline.pictures import picture_of
from offline.scoring import Item, Point
from offline.verification.http_target import HttpTarget
from offline.verification.probes import NONE, NotAnswered, Probe
from offline.verification.run import verify
from tests.evaluation_world import build_tokenizer
from tests.offline.pictures import png

URL = "http://server"
ODD = [None, True, -1, 7, float("nan"), float("inf"), 10**5000, "x", "7", [], {}, [[]], {"7": 7}]
MODELS = {"data": [{"id": "m", "max_model_len": 99, "root": "m"}, {"id": "m:v", "parent": "m"}]}
GIVEN = [None, {"2": {"logprob": -1.5, "rank": 1}}, {"3": {"logprob": -2.5, "rank": 2}}]
STEPS = {"tokens": ["token_id:4"], "top_logprobs": [{"token_id:4": -0.5, "token_id:5": -1.0}]}
USAGE = {"completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}
RECEIPT = {"steered": True, "vectors": [{"name": "v", "strength": 0.5}]}
ECHO = {
    "token_logprobs": [None, -1.0, -2.0, -3.0],
    "top_logprobs": [None, {"a": -1.0}, {"b": -1.5}, {"c": -3.0}],
}
CHOICE = {
    "index": 0, "text": "x", "finish_reason": "stop", "logprobs": STEPS, "prompt_logprobs": GIVEN
}  # fmt: skip
COMPLETION = {"choices": [CHOICE], "usage": USAGE, "grains": RECEIPT}
CHAT = {
    "choices": [{"message": {"content": "TRUE"}, "finish_reason": "stop"}], "usage": USAGE,
    "prompt_token_ids": [1, 2, 3], "prompt_logprobs": GIVEN,
}  # fmt: skip
GOOD = {
    "/v1/models": MODELS,
    "/version": {"version": "0.32.0"},
    "/tokenize": {"tokens": [1, 2]},
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
}


def variants(value):
    """`value` with one part of it, at any depth, replaced, left out or doubled."""
    yield from ODD
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            yield from ({**value, key: odd} for odd in variants(inner))
    if isinstance(value, list):
        yield value * 2
        for place, inner in enumerate(value):
            yield from ([*value[:place], odd, *value[place + 1 :]] for odd in variants(inner))


class Server:
    """Answers from memory; `answers` holds a document or bytes by path."""

    def __init__(self, monkeypatch):
        self.answers = dict(GOOD)
        transport = httpx.MockTransport(self.answer)
        make = lambda self, kind: kind(base_url=self.url, transport=transport)  # noqa: E731
        monkeypatch.setattr(Endpoint, "_client", make)

    def answer(self, request):
        found = self.answers[request.url.path]
        payload = found if isinstance(found, bytes) else json.dumps(found).encode()
        return httpx.Response(200, content=payload)


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch)


PAIR = Pair("1", "1", [{"role": "user", "content": "?"}], "x", "y",
            picture=picture_of({"bytes": png("red")}, "1", None))  # fmt: skip
PROBE = Probe((1, 2, 3), NONE, answer=1)
SETTING = Setting("v", "m:v", {}, True)
RUBRIC = Rubric("r", "score", {"TRUE": 1.0}, "{{ answer }}")


def _target():
    return Target(Endpoint(URL), [SETTING], build_tokenizer(), "", 99, {})


def _answers():
    prompts = [Prompt(Pair("1", "1", "a", "", ""), {}), Prompt(PAIR, {})]
    found = Answers(prompts, 8, lambda total: progress(total, visible=False))
    return lambda: (found._found.clear(), found.of(_TARGET, SETTING))


_TARGET = _target()
_ENDPOINT = Endpoint(URL)
# Per way to ask: the path whose answers are odd, and what asks, made while they are good.
WAYS = {
    "target": ("/v1/models", lambda: lambda: HttpTarget(URL, None, "m")),
    "probe": ("/v1/completions", lambda: lambda t=_http(): t.ask([PROBE])),
    "probes": ("/v1/completions", lambda: lambda t=_http(): t.ask([PROBE] * 2, together=True)),
    "sample": ("/v1/completions", lambda: lambda t=_http(): t.sample(1, 1, 0)),
    "scorer": (
        "/v1/completions",
        lambda: lambda s=EndpointScorer(URL, {("v", (1,)): "m:v"}, "m"): list(
            s.score([Item((1,), (2, 3))], [None, Point("v", (1,), 0.5)])
        ),
    ),
    "models": ("/v1/models", lambda: lambda: connect(_ENDPOINT, "m", ["m:v"])),
    "tokens": ("/tokenize", lambda: lambda: connect(_ENDPOINT, "m", ["m:v"])),
    "version": ("/version", lambda: lambda: connect(_ENDPOINT, "m", ["m:v"])),
    "answers": ("/v1/completions", _answers),
    "answers to images": ("/v1/chat/completions", _answers),
    "prompts": ("/v1/chat/completions", lambda: lambda: prompt_tokens(_ENDPOINT, "m", [PAIR])),
    "scores": (
        "/v1/chat/completions",
        lambda: lambda: score_answers(_ENDPOINT, [(PAIR, "x", [1, 2])], SETTING),
    ),
    "judge": (
        "/v1/chat/completions",
        lambda: lambda: Judge(_ENDPOINT, "j").ask(RUBRIC, [{"answer": "a"}], [None]),
    ),
}


def _http():
    return HttpTarget(URL, None, "m")


def check(server, path, ask, document, written=lambda odd: json.dumps(odd).encode()):
    """Returns how many of the odd documents were refused."""
    server.answers[path] = written(document)
    ask()
    refused = 0
    for odd in variants(document):
        server.answers[path] = written(odd)
        try:
            ask()
        except NotAnswered:
            continue
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{URL}{path}: ") or "server" in str(error), error
    return refused


@pytest.mark.parametrize("way", WAYS)
def test_odd_answers_are_refused_or_do_not_matter(server, monkeypatch, way):
    monkeypatch.setattr(targets, "_tokenizer", lambda source: build_tokenizer_once())
    monkeypatch.setattr(targets, "_processor", lambda source: None)
    server.answers["/tokenize"] = {"tokens": build_tokenizer_once()(targets._SAMPLE,
                                   add_special_tokens=False)["input_ids"]}  # fmt: skip
    path, make = WAYS[way]
    refused = check(server, path, make(), server.answers[path])
    assert refused > 9 or way == "version"  # for reports only, so it may be missing


def build_tokenizer_once(made=[]):  # noqa: B006
    if not made:
        made.append(build_tokenizer())
    return made[0]


def test_odd_pieces_of_a_stream(server):
    piece = {"choices": [{"logprobs": STEPS}], "usage": USAGE, "grains": RECEIPT}
    ask = _http()

    def written(odd):
        return b"data: " + json.dumps(odd).encode() + b"\r\n\r\ndata: [DONE]\n\n"

    assert check(server, "/v1/completions", lambda: ask.stream(PROBE), piece, written) > 9
    for payload in (b"", b"data: [DONE]", b": nothing\n\n", b"data: {", b"data: \xff\n"):
        server.answers["/v1/completions"] = payload
        with pytest.raises(InputError, match=f"{URL}/v1/completions: not the answer"):
            ask.stream(PROBE)
    server.answers["/v1/completions"] = b'data: {"error": {"message": "no"}}\n\n'
    with pytest.raises(NotAnswered, match="no"):
        ask.stream(PROBE)


def test_odd_answers_to_lm_eval(server, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from offline.evaluation.harness_model import SettingLM

    build_tokenizer().save_pretrained(tmp_path)
    target = Target(_ENDPOINT, [SETTING], build_tokenizer(), str(tmp_path), 99, {})
    model, path = SettingLM(target, SETTING, 8, False), "/v1/completions"
    scored = {"choices": [{"index": 0, "logprobs": ECHO}]}
    asked = [(("a", "b"), [1, 2], [3])]
    assert check(server, path, lambda: model._loglikelihood_tokens(asked), scored) > 9
    server.answers[path] = scored
    assert model._loglikelihood_tokens(asked) == [(-2.0, False)]
    said = SimpleNamespace(args=("a", {"until": ["\n"]}))
    assert check(server, path, lambda: model.generate_until([said]), COMPLETION) > 9


@pytest.mark.parametrize("status", [302, 400, 404, 500])
def test_a_server_that_refuses_everything_cannot_be_verified(server, monkeypatch, status):
    found = _http()
    monkeypatch.setattr(server, "answer", lambda _: httpx.Response(status, content=b"no"))
    monkeypatch.setattr(
        Endpoint, "_client",
        lambda self, kind: kind(base_url=URL, transport=httpx.MockTransport(server.answer)),
    )  # fmt: skip
    with pytest.raises(InputError, match=f"{URL} cannot be verified: it says no"):
        verify(found, ["v"], {}, lambda *_: iter(()))


def test_a_model_of_short_requests_cannot_be_verified(server):
    server.answers["/v1/models"] = {"data": [{"id": "m", "max_model_len": 9}]}
    with pytest.raises(InputError, match="max_model_len is 9, expected 64 or more"):
        verify(HttpTarget(URL, None, None), ["v"], {}, lambda *_: iter(()))
