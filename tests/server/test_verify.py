"""`grains verify` against a real server, and against the same server with something broken."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from typer.testing import CliRunner

from offline.cli import app
from offline.verification import door_checks
from offline.verification.batch_checks import check_batch
from offline.verification.bench import prepare
from offline.verification.cache_checks import check_cache
from offline.verification.http_target import HttpTarget
from offline.verification.receipt_checks import check_receipts
from offline.verification.steering_checks import check_vector

pytestmark = pytest.mark.engine

STRENGTH = 0.5


def grains_verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_healthy_server_passes_every_check(server, tmp_path):
    folder = server.log.parent
    files = [f"--vector={name}={folder / name}.safetensors" for name in ("truthful", "polite")]
    done = grains_verify("--url", server.url, *files, "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert {check["verdict"] for check in report["checks"]} == {"passed"}, done.output
    assert report["good"] and report["seconds"] < 120
    named = {check["check"] for check in report["checks"]}
    for words in ("fires", "plain after", "cached tokens", "receipt", "mixed batch", "refused"):
        assert any(words in name for name in named), words
    # Whoever looks again finds what was there before.
    assert grains_verify("--url", server.url, *files[:1]).exit_code == 0


def test_it_says_what_is_wrong_with_the_question(server, tmp_path):
    for arguments, words in [
        ([], "--url"),
        (["--url", server.url, "--vector", "unknown"], "polite, truthful"),
        (["--url", server.url, "--model", "large"], "tiny"),
        (["--url", server.url, "--config", "steering.yaml"], "--config"),
        (["--url", "http://127.0.0.1:9"], "no answer"),
    ]:
        done = grains_verify(*arguments)
        assert done.exit_code == 2 and words in done.output, done.output


class Proxy:
    """Stands between verify and the server, and breaks one thing.

    Attributes:
        ask: changes a request's body; told how many requests are under way.
        answer: changes the body of a JSON answer, given its request.
    """

    def __init__(self, url, ask=None, answer=None):
        self.url, self.ask, self.answer = url, ask, answer
        self.under_way, self.lock = 0, threading.Lock()

    def pass_on(self, method, path, body):
        with self.lock:
            self.under_way += 1
        try:
            if body is not None and self.ask is not None:
                threading.Event().wait(0.05)  # until a batch is complete
                self.ask(body, self.under_way)
            response = httpx.request(method, self.url + path, json=body, timeout=60)
            content, kind = response.content, response.headers["content-type"]
            if self.answer is not None and body and kind.startswith("application/json"):
                found = response.json()
                self.answer(found, body)
                content = json.dumps(found).encode()
            return response.status_code, kind, content
        finally:
            with self.lock:
                self.under_way -= 1


@contextmanager
def proxy(server, ask=None, answer=None):
    way = Proxy(server.url, ask, answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            status, kind, content = way.pass_on(self.command, self.path, body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()


def fields(body):
    return body.get("vllm_xargs") or {}


def steers(body):
    return fields(body).get("steering", "none") != "none" or ":" in body.get("model", "")


def drop_fields(body, _):
    body.pop("vllm_xargs", None)


def drop_alias(body, _):
    body["model"] = body["model"].partition(":")[0]


def lose_the_sign(body, _):
    if "steering_strength" in fields(body):
        body["vllm_xargs"]["steering_strength"] = abs(body["vllm_xargs"]["steering_strength"])


def ignore_positions(body, _):
    fields(body).pop("steering_positions", None)


def never_zero(body, _):
    if fields(body).get("steering_strength") == 0:
        body["vllm_xargs"]["steering_strength"] = 1e-3


def sticky():
    """After steered traffic, plain requests are steered a little."""
    seen = []

    def ask(body, _):
        if steers(body):
            seen.append(body)
        elif seen:
            body["vllm_xargs"] = {"steering": "truthful=0.001"}

    return ask


def mix(body, under_way):
    if under_way > 1 and "steering_strength" in fields(body):
        body["vllm_xargs"]["steering_strength"] *= 0.9


def share_the_cache(answer, body):
    if steers(body) and body.get("prompt_logprobs") is None:
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 224}


def cached_answer():
    """The first answer of a salt is the answer of all."""
    first = {}

    def change(answer, body):
        if "cache_salt" in body:
            known = first.setdefault(body["cache_salt"], answer["choices"])
            answer["choices"] = known

    return change


def no_receipt(answer, _):
    answer.pop("grains", None)


def miscount(answer, _):
    if "grains" in answer:
        answer["grains"]["prompt_tokens"] += 1


def accept_unknown(body, _):
    if fields(body).get("steering") == door_checks.NOBODY:
        body["vllm_xargs"] = {"steering": "none"}


def stream_unsteered(body, _):
    if body.get("stream"):
        drop_alias(body, _)


def vector(bench, target):
    return check_vector(bench, "truthful")


def cache(bench, target):
    return check_cache(bench, "truthful", STRENGTH)


def receipts(bench, target):
    return check_receipts(bench, "truthful", STRENGTH, None)


def batch(bench, target):
    return check_batch(bench, [("truthful", STRENGTH), ("polite", STRENGTH)])


def refusals(bench, target):
    return door_checks.check_refusals(target, bench, "truthful")


def stream(bench, target):
    return door_checks.check_stream(target, bench, "truthful")


BROKEN = {
    "fields are dropped": (
        {"ask": drop_fields},
        vector,
        {"alias equals request fields", "+s and -s differ", "positions: generation only"},
    ),
    "aliases are dropped": (
        {"ask": drop_alias},
        vector,
        {"steering fires (alias)", "alias equals request fields"},
    ),
    "the sign is lost": ({"ask": lose_the_sign}, vector, {"+s and -s differ"}),
    "positions are ignored": ({"ask": ignore_positions}, vector, {"positions: generation only"}),
    "strength 0 is not 0": ({"ask": never_zero}, vector, {"strength 0 equals plain"}),
    "steering leaks": ({"ask": sticky}, vector, {"plain after steered traffic"}),
    "a batch is mixed up": ({"ask": mix}, batch, {"a mixed batch equals its requests alone"}),
    "cached tokens are shared": (
        {"answer": share_the_cache},
        cache,
        {"cached tokens tell steerings apart"},
    ),
    "cached answers are shared": (
        {"answer": cached_answer},
        cache,
        {"steered after plain equals steered with a cold cache"},
    ),
    "no receipt": ({"answer": no_receipt}, receipts, {"the receipt is right"}),
    "a wrong receipt": ({"answer": miscount}, receipts, {"the receipt is right"}),
    "unknown names are taken": ({"ask": accept_unknown}, refusals, {"refused: unknown vector"}),
    "streams are plain": ({"ask": stream_unsteered}, stream, {"streaming gives the same answer"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(server, name):
    changes, checks, expected = BROKEN[name]
    changes = {way: change() if change in (sticky, cached_answer) else change
               for way, change in changes.items()}  # fmt: skip
    with proxy(server, **changes) as url:
        target = HttpTarget(url, None, None)
        found = {outcome.check: outcome.verdict for outcome in checks(prepare(target), target)}
    assert {check for check, verdict in found.items() if verdict == "failed"} >= expected, found


def test_the_proxy_alone_breaks_nothing(server):
    with proxy(server) as url:
        assert grains_verify("--url", url, "--vector", "truthful").exit_code == 0


def test_a_failed_check_is_exit_code_1(server):
    with proxy(server, answer=no_receipt) as url:
        done = grains_verify("--url", url, "--vector", "truthful")
    assert done.exit_code == 1 and "there is no receipt" in done.output


def test_another_artifact_is_noticed(server):
    other = server.log.parent / "polite.safetensors"
    done = grains_verify("--url", server.url, "--vector", f"truthful={other}")
    assert done.exit_code == 1 and "digest is" in done.output
