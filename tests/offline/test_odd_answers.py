"""Every part of every answer replaced by something else: nothing but a message comes of it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

from offline.cli import app
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
from tests.offline.odd import variants
from tests.offline.pictures import png

URL = "http://server"
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


class Server:
    """Answers from memory, and those who ask it.

    Attributes:
        answers: a document, or bytes, by path.
    """

    def __init__(self, monkeypatch):
        self.answers = dict(GOOD)
        transport = httpx.MockTransport(self.answer)
        monkeypatch.setattr(
            Endpoint, "_client", lambda self, kind: kind(base_url=self.url, transport=transport)
        )
        self.http = HttpTarget(URL, None, "m")
        self.scorer = EndpointScorer(URL, {("v", (1,)): "m:v"}, "m")
        self.endpoint = Endpoint(URL)

    def answer(self, request):
        found = self.answers[request.url.path]
        if isinstance(found, httpx.Response):
            return found
        payload = found if isinstance(found, bytes) else json.dumps(found).encode()
        return httpx.Response(200, stream=httpx.ByteStream(payload))


@pytest.fixture
def server(monkeypatch):
    return Server(monkeypatch)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


PAIR = Pair(
    "1", "1", [{"role": "user", "content": "?"}], "x", "y",
    picture=picture_of({"bytes": png("red")}, "1", None),
)  # fmt: skip
PROBE = Probe((1, 2, 3), NONE, answer=1)
SETTING = Setting("v", "m:v", {}, True)
RUBRIC = Rubric("r", "score", {"TRUE": 1.0}, "{{ answer }}")
ITEM, POINT = Item((1,), (2, 3)), Point("v", (1,), 0.5)
# Per way to ask: the path whose answers are odd, and what asks.
WAYS = {
    "target": ("/v1/models", lambda server: HttpTarget(URL, None, "m")),
    "probe": ("/v1/completions", lambda server: server.http.ask([PROBE])),
    "probes": ("/v1/completions", lambda server: server.http.ask([PROBE] * 2, together=True)),
    "sample": ("/v1/completions", lambda server: server.http.sample(1, 1, 0)),
    "scorer": ("/v1/completions", lambda server: list(server.scorer.score([ITEM], [None, POINT]))),
    "models": ("/v1/models", lambda server: connect(server.endpoint, "m", ["m:v"])),
    "tokens": ("/tokenize", lambda server: connect(server.endpoint, "m", ["m:v"])),
    "prompts": ("/v1/chat/completions", lambda server: prompt_tokens(server.endpoint, "m", [PAIR])),
    "scores": (
        "/v1/chat/completions",
        lambda server: score_answers(server.endpoint, [(PAIR, "x", [1, 2])], SETTING),
    ),
    "judge": (
        "/v1/chat/completions",
        lambda server: Judge(server.endpoint, "j").ask(RUBRIC, [{"answer": "a"}], [None]),
    ),
}


def check(server, path, ask, document, written=lambda odd: json.dumps(odd).encode()):
    """Asks with every variant of a document; some must be refused, all of these by name."""
    server.answers[path] = written(document)
    ask()
    refused = []
    for odd in variants(document):
        server.answers[path] = written(odd)
        try:
            ask()
        except InputError as error:
            refused.append(str(error))
        except NotAnswered:
            pass
    assert len(refused) > 9
    assert all("server" in text for text in refused)
    assert sum(text.startswith(f"{URL}{path}: not the answer") for text in refused) > 9


@pytest.mark.parametrize("way", WAYS)
def test_odd_answers_are_refused_or_do_not_matter(server, monkeypatch, tokenizer, way):
    monkeypatch.setattr(targets, "_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr(targets, "_processor", lambda source: None)
    ids = tokenizer(targets._SAMPLE, add_special_tokens=False)["input_ids"]
    server.answers["/tokenize"] = {"tokens": ids[:9]}
    monkeypatch.setattr(targets, "_SAMPLE", tokenizer.decode(ids[:9]))
    path, ask = WAYS[way]
    check(server, path, lambda: ask(server), server.answers[path])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_odd_texts(server, tokenizer, path):
    target = Target(server.endpoint, [SETTING], tokenizer, "", 99, {})
    prompts = [Prompt(Pair("1", "1", "a", "b", "c"), {}), Prompt(PAIR, {})]

    def ask():
        return Answers(prompts, 8, lambda total: nullcontext(lambda n: None)).of(target, SETTING)

    check(server, path, ask, server.answers[path])


def test_what_the_server_is_called_does_not_matter(server):
    for odd in variants(GOOD["/version"]):
        server.answers["/version"] = odd
        assert targets._version(server.endpoint) is None or isinstance(odd["version"], str)


def test_odd_pieces_of_a_stream(server):
    piece = {"choices": [{"logprobs": STEPS}], "usage": USAGE, "grains": RECEIPT}

    def written(odd):
        return b"data: " + json.dumps(odd).encode() + b"\r\n\r\ndata: [DONE]\n\n"

    check(server, "/v1/completions", lambda: server.http.stream(PROBE), piece, written)
    for payload in (b"", b"data: [DONE]", b": nothing\n\n", b"data: {", b"data: \xff\n"):
        server.answers["/v1/completions"] = payload
        with pytest.raises(InputError, match=f"{URL}/v1/completions: not the answer"):
            server.http.stream(PROBE)
    server.answers["/v1/completions"] = b'data: {"error": {"message": "no"}}\n\n'
    with pytest.raises(NotAnswered, match="no"):
        server.http.stream(PROBE)


def test_odd_answers_to_lm_eval(server, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from offline.evaluation.harness_model import SettingLM

    tokenizer.save_pretrained(tmp_path)
    target = Target(server.endpoint, [SETTING], tokenizer, str(tmp_path), 99, {})
    model, path = SettingLM(target, SETTING, 8, False), "/v1/completions"
    scored = {"choices": [{"index": 0, "logprobs": ECHO}]}
    asked = [(("a", "b"), [1, 2], [3])]
    check(server, path, lambda: model._loglikelihood_tokens(asked), scored)
    server.answers[path] = scored
    assert model._loglikelihood_tokens(asked) == [(-2.0, False)]
    said = SimpleNamespace(args=("a", {"until": ["."]}))
    check(server, path, lambda: model.generate_until([said]), COMPLETION)


@pytest.mark.parametrize("status", [302, 400, 404, 500])
def test_a_server_that_refuses_everything_cannot_be_verified(server, status):
    server.answers["/v1/completions"] = httpx.Response(status, stream=httpx.ByteStream(b"no"))
    with pytest.raises(InputError, match=f"{URL} cannot be verified: it says no"):
        verify(server.http, ["v"], {}, lambda *_: iter(()))


def test_a_model_of_short_requests_cannot_be_verified(server):
    server.answers["/v1/models"] = {"data": [{"id": "m", "max_model_len": 9}]}
    with pytest.raises(InputError, match="max_model_len is 9, expected 64 or more"):
        verify(HttpTarget(URL, None, None), ["v"], {}, lambda *_: iter(()))


COMMANDS = {
    "verify": [],
    "evaluate": ["--model", "m", "--steered", "m:v", "--task", "perplexity", "--text", "t.txt"],
}


@pytest.mark.parametrize("payload", [b"<html>", b"[]", b"null", b"5", b"[" * 9999, b"{}", b"\xff"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_with_one_line(server, tmp_path, monkeypatch, command, payload):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("w")
    server.answers["/v1/models"] = payload
    more = ["--out", "x.json", *COMMANDS[command]] if command == "evaluate" else []
    done = CliRunner().invoke(app, [command, "--url", URL, *more])
    assert done.exit_code == 2 and not (tmp_path / "x.json").exists()
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {URL}/v1/models: not the answer that was expected")
