"""Many requests, few answers: order, retries, refusals. The server here is a stand-in that fails
on purpose, which a real one cannot be asked to do."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from offline import endpoint
from offline.endpoint import Endpoint, Refused
from offline.errors import InputError


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
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked, busy
    finally:
        running.shutdown()
        running.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


def test_answers_keep_the_order_of_the_questions():
    def answer(body, number):
        threading.Event().wait(0.002 * (number % 5))
        return 200, {}, body["n"] * 2

    done = []
    with server(answer) as (url, asked, busy):
        found = Endpoint(url, "secret", 4).post_all(
            "/x", [{"n": n} for n in range(40)], done.append
        )
    assert found == [2 * n for n in range(40)]
    assert sum(done) == 40 and 1 < busy["most"] <= 4
    assert {key for _, key in asked} == {"Bearer secret"}


def test_a_busy_server_is_asked_again():
    def answer(body, number):
        return (503 if number < 3 else 200), {"Retry-After": "0"}, {"message": "busy"}

    with server(answer) as (url, asked, _):
        assert Endpoint(url).post_all("/x", [{}]) == [{"message": "busy"}]
        assert len(asked) == 3


def test_a_server_that_stays_busy_is_an_error_after_some_attempts():
    with (
        server(lambda *_: (429, {}, {"error": {"message": "too many"}})) as (url, asked, _),
        pytest.raises(InputError, match=r"no answer after 5 attempts .*429: too many"),
    ):
        Endpoint(url).post_all("/x", [{}])
    assert len(asked) == 5


def test_a_refusal_is_not_repeated_and_says_why():
    with (
        server(lambda *_: (400, {}, {"error": {"message": "steering: unknown"}})) as (
            url,
            asked,
            _,
        ),
        pytest.raises(Refused, match="HTTP 400: steering: unknown") as error,
    ):
        Endpoint(url, concurrency=1).post_all("/x", [{}, {}, {}])
    assert error.value.status == 400 and len(asked) == 1


def test_nobody_there():
    with pytest.raises(InputError, match=r"no answer after 5 attempts .*ConnectError"):
        Endpoint("http://127.0.0.1:9").get("/v1/models")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_addresses_are_checked(url):
    with pytest.raises(InputError, match="no address"):
        Endpoint(url)


def test_the_reported_address_holds_no_password_and_no_v1():
    found = Endpoint("https://me:word@host:1/v1/")
    assert found.url == "https://me:word@host:1" and found.name == "https://host:1"
