"""Requests over HTTP: order, retries, refusals, and whatever else may stand at an address."""

import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import RootModel

from offline import endpoint
from offline.answer_forms import Models
from offline.endpoint import Endpoint, Refused
from offline.errors import InputError

Anything = RootModel[object]


@contextmanager
def server(answer):
    """Answers with (status, headers, JSON) = answer(body, number of requests so far)."""
    asked, lock = [], threading.Lock()
    busy = {"now": 0, "most": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((body, self.headers.get("Authorization")))
                number = len(asked)
                busy["now"] += 1
                busy["most"] = max(busy.values())
            status, headers, value = answer(body, number)
            with lock:
                busy["now"] -= 1
            payload = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(payload))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked, busy
    finally:
        running.shutdown()
        running.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


def post_all(found, bodies, on_done=lambda count: None):
    return found.post_all("/x", bodies, Anything, lambda _, answer: answer.root, on_done)


def test_answers_keep_the_order_of_the_questions():
    def answer(body, number):
        threading.Event().wait(0.002 * (number % 5))
        return 200, {}, body["n"] * 2

    done = []
    with server(answer) as (url, asked, busy):
        found = post_all(Endpoint(url, "secret", 4), [{"n": n} for n in range(40)], done.append)
    assert found == [2 * n for n in range(40)]
    assert sum(done) == 40 and 1 < busy["most"] <= 4
    assert {key for _, key in asked} == {"Bearer secret"}


def test_a_busy_server_is_asked_again():
    def answer(body, number):
        return (503 if number < 3 else 200), {"Retry-After": "0"}, {"message": "busy"}

    with server(answer) as (url, asked, _):
        assert post_all(Endpoint(url), [{}]) == [{"message": "busy"}]
        assert len(asked) == 3
    with server(answer) as (url, asked, _):
        assert Endpoint(url).post("/x", {}, Anything, lambda found: found.root["message"]) == "busy"
        assert len(asked) == 3


def test_a_server_that_stays_busy_is_an_error_after_some_attempts():
    with (
        server(lambda *_: (429, {}, {"error": {"message": "too many"}})) as (url, asked, _),
        pytest.raises(InputError, match=r"no answer after 5 attempts .*429: too many"),
    ):
        post_all(Endpoint(url), [{}])
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("wish", "wait"), [("2", 2), ("1e999", 30), ("-1", 0.5), ("nan", 0.5), ("Sun, 29 Nov", 0.5)]
)
def test_a_busy_server_may_say_when_to_come_again(wish, wait):
    assert endpoint._asked_wait({"retry-after": wish}, 0.5) == wait


def test_a_refusal_is_not_repeated_and_says_why():
    with (
        server(lambda *_: (400, {}, {"error": {"message": "steering: unknown"}})) as (
            url,
            asked,
            _,
        ),
        pytest.raises(Refused, match="HTTP 400: steering: unknown") as error,
    ):
        post_all(Endpoint(url, concurrency=1), [{}, {}, {}])
    assert error.value.status == 400 and len(asked) == 1


def test_nobody_there():
    with pytest.raises(InputError, match=r"no answer after 5 attempts .*ConnectError"):
        Endpoint("http://127.0.0.1:9").get("/v1/models", Models)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "", "http://", "http://x:99999", "http://x:-1", "http://x:p",
     "http://[::1", "http://\x00", "http://xn--\ud800", "http://x?a=b", "http://x/v1#y"],
)  # fmt: skip
def test_addresses_are_checked(url):
    with pytest.raises(InputError, match="no address"):
        Endpoint(url)


def test_an_address_that_only_the_resolver_finds_wrong():
    with pytest.raises(InputError, match=r"http://a\.\.b/x: "):
        post_all(Endpoint("http://a..b"), [{}])


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\n"])
def test_keys_are_checked_and_not_shown(key):
    with pytest.raises(InputError, match="the API key holds") as error:
        Endpoint("http://x", key)
    assert key not in str(error.value)


@pytest.mark.parametrize("proxy", ["gopher://x", "http://x:99999x"])
def test_proxies_of_the_environment_are_checked(proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InputError, match="http://h: HTTP_PROXY or ALL_PROXY: "):
        Endpoint("http://h").get("/v1/models", Models)


def test_the_reported_address_holds_no_password_and_no_v1():
    found = Endpoint("https://me:word@host:1/v1/")
    assert found.url == "https://me:word@host:1" and found.name == "https://host:1"


@contextmanager
def speaking(reply):
    """Says the same bytes to everybody, whatever they ask, and nothing more."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection, suppress(OSError):  # whoever has heard enough hangs up
            connection.recv(2**16)
            connection.sendall(reply)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):  # else the system takes back what was sent
                pass

    def serve():
        with suppress(OSError):  # until it is closed
            while True:
                threading.Thread(target=answer, args=listening.accept()[:1], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def http(payload=b"", status="200 OK", *headers):
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(payload)}", "", ""]
    return "\r\n".join(lines).encode() + payload


NONSENSE = {
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "RemoteProtocolError"),
    "nothing": (b"", "RemoteProtocolError"),
    "half an answer": (http(b"{}")[:-1], "RemoteProtocolError"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "RemoteProtocolError"),
    "HTML": (http(b"<html>Welcome</html>"), "Invalid JSON.*it begins '<html>Welcome"),
    "no text": (http(b'{"data": "\xff"}'), "Invalid JSON"),
    "no body": (http(), "Invalid JSON"),
    "list": (http(b"[]"), "should be an object"),
    "null": (http(b"null"), "should be an object"),
    "5": (http(b"5"), "should be an object"),
    "deep": (http(b"[" * 99_999), "recursion limit"),
    "other": (http(b'{"choices": []}'), "data: Field required"),
    "empty": (http(b'{"data": []}'), "data: List should have at least 1 item"),
    "of texts": (http(b'{"data": ["tiny"]}'), r"data\[0\]: Input should be an object"),
    "half a surrogate": (http(b'{"data": [{"id": "\\ud800"}]}'), "Invalid JSON"),
    "a long number": (http(b'{"data": [{"id": 1%s}]}' % (b"0" * 9999)), "number out of range"),
    "a length": (http(b'{"data": [{"id": "x", "max_model_len": -1}]}'), "max_model_len: Input"),
    "gzip": (http(b"\x1f\x8b no", "200 OK", "Content-Encoding: gzip"), "is in 'gzip'"),
    "large": (http(b'{"data": "' + b"x" * 150_000 + b'"}'), "is larger than 150000 bytes"),
    "elsewhere": (http(b"", "302 Found", "Location: /login"), "HTTP 302: /login"),
    "in circles": (http(b"", "307 Moved", "Location: http://[:99999"), r"HTTP 307: http://\["),
    "refusal in depth": (http(b"[" * 99_999, "400 Bad"), r"HTTP 400: \[\[\["),
    "large refusal": (http(b"x" * 3_000, "404 Not Found"), "HTTP 404: x{499}…$"),
    "a terminal's colours": (http(b"\x1b[31mno", "400 Bad"), "HTTP 400: ⟨U\\+001B⟩"),
    "no content": (http(b"", "204 No Content"), "HTTP 204"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_whatever_stands_there_is_named(case, monkeypatch):
    """In each of the ways to ask, the error names the address and what was found there."""
    monkeypatch.setattr(endpoint, "LARGEST", 150_000)
    monkeypatch.setattr(endpoint, "LONGEST_REFUSAL", 1_000)
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    reply, message = NONSENSE[case]
    with speaking(reply) as url:
        found = Endpoint(url, timeout_s=5)
        for ask in (
            lambda: found.get("/v1/models", Models),
            lambda: found.post_all("/v1/models", [{}] * 2, Models, lambda *_: None),
            lambda: found.post("/v1/models", {}, Models, lambda _: None),
        ):
            with pytest.raises(InputError, match=f"(?s){url}/v1/models: .*{message}"):
                ask()


def test_answers_have_a_limit_of_time(monkeypatch):
    """A server that sends a byte now and then is never late, and never done."""
    now = iter(range(0, 1000, 40))
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: next(now))
    reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 9
    with speaking(reply) as url, pytest.raises(InputError, match="did not end in time"):
        Endpoint(url, timeout_s=100).post("/x", {}, Models, lambda _: None)
