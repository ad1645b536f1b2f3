"""A stand-in for a server with a vision-language model, and for its judge.

It renders chats into bytes, answers and scores by rules that tests can work out by themselves, and
keeps what it was asked. tests/server compares a real server with transformers.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

IMAGE_TOKENS = 4


def logp(ids: list[int], place: int, model: str) -> float:
    """Of the token at a place, given those before it; every alias has its own."""
    seed = f"{model}{ids[: place + 1]}".encode()
    return -hashlib.sha256(seed).digest()[0] / 64


def image_ids(payload: bytes) -> list[int]:
    """The tokens that an image becomes: different for different images."""
    return [1000 + byte for byte in hashlib.sha256(payload).digest()[:IMAGE_TOKENS]]


def rendered(body: dict[str, Any], trims: bool = False) -> list[int]:
    """The prompt's tokens; `trims` opens the answer in another way than the prompt ends."""
    ids: list[int] = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        ids += f"{message['role'][0]}:".encode()
        for part in parts:
            if part["type"] == "image_url":
                head, _, data = part["image_url"]["url"].partition(",")
                assert head == "data:image/png;base64"
                ids += image_ids(base64.b64decode(data))
            else:
                ids += part["text"].encode()
        if not (body.get("continue_final_message") and message is body["messages"][-1]):
            ids += b"\n"
    if body.get("add_generation_prompt", True):
        ids += b"a: " if trims else b"a:"
    return ids


@contextmanager
def image_server(
    aliases: tuple[str, ...] = (), judge: Any = None, trims: bool = False, border: bool = False
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serves `tiny` and `tiny:ALIAS`.

    Args:
        judge: from (text, has an image, number so far) to what the model `judge` says.
        border: aliases steer prompt and answer differently.

    Yields:
        The address, and the chat requests so far.
    """
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            names = ["tiny", *(f"tiny:{name}" for name in aliases)]
            cards = [{"id": name, "max_model_len": 4096, "root": "tiny"} for name in names]
            found = {"/v1/models": {"data": cards}, "/version": {"version": "0"}}
            self._reply(200, found[self.path])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self._reply(404, {"error": {"message": "not here"}})
            elif self.path == "/v1/completions":
                reason = "steering_prompt_tokens: of no use with steering_positions 'all'"
                self._reply(200 if border else 400, {"error": {"message": reason}})
            else:
                assert self.path == "/v1/chat/completions"
                with lock:
                    asked.append(body)
                    number = len(asked)
                self._reply(200, _judged(body, number) if body["model"] == "judge" else _chat(body))

        def _reply(self, status: int, value: Any) -> None:
            payload = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None:
            pass

    def _judged(body: dict[str, Any], number: int) -> Any:
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[1]["text"]
        said = judge(text, not isinstance(content, str), number)
        return {"choices": [{"message": {"content": said}}]}

    def _chat(body: dict[str, Any]) -> Any:
        ids = rendered(body, trims)
        found: dict[str, Any] = {"usage": {"completion_tokens": 2}}
        said = f"{body['model']} sees {ids[2]}"
        found["choices"] = [{"message": {"content": said}, "finish_reason": "stop"}]
        if body.get("return_token_ids"):
            found["prompt_token_ids"] = ids
        if "prompt_logprobs" in body:
            entries = [
                {str(token): {"logprob": logp(ids, place, body["model"]), "rank": 1}}
                for place, token in enumerate(ids)
            ]
            found["prompt_logprobs"] = [None, *entries[1:]]
        return found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
