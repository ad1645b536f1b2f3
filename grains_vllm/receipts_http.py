"""Puts the receipt into HTTP responses, as `"grains"`, where clients ignore it.

An ASGI middleware serves every endpoint that generates. Responses to requests without steering pass
untouched. Nothing is held back but the start of a JSON response, whose length changes; in a stream
only the events that end an answer are read at all. /v1/responses has objects that outlive their
HTTP request (background, store); those carry the receipt themselves.
"""

import json
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from grains_vllm.receipts import Receipt, collected, combined

KEY = "grains"
# What events that end an answer look like, before anything is parsed: OpenAI's, Anthropic's and
# Cohere's. Quotes within a string are escaped, so that no text of a model looks like this.
_ENDS = (b'"finish_reason":"', b"event: message_delta\n", b'"type":"message-end"')


class ReceiptMiddleware:
    """For vLLM's --middleware list, before any middleware that compresses."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        receipts: list[Receipt] = []
        token = collected.set(receipts)
        try:
            await self._app(scope, receive, _Response(send, receipts).send)
        finally:
            collected.reset(token)


class _Response:
    """One response on its way out."""

    def __init__(self, send: Any, receipts: list[Receipt]) -> None:
        self._send = send
        self._receipts = receipts
        self._kind = ""
        self._held: dict[str, Any] | None = None
        self._body = bytearray()

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._kind = _kind(message)
            # The endpoint has done its work by now, unless it streams.
            if self._kind == "application/json" and self._receipts:
                self._held = message
                return
        elif message["type"] == "http.response.body" and self._receipts:
            if self._held is not None:
                self._body += message.get("body", b"")
                if message.get("more_body"):
                    return
                message = await self._release(self._held)
            elif self._kind == "text/event-stream":
                body = message.get("body", b"")
                if any(mark in body for mark in _ENDS):
                    message = {**message, "body": self._stamp(body)}
        await self._send(message)

    async def _release(self, start: dict[str, Any]) -> dict[str, Any]:
        """Sends the start of a JSON response; returns its body."""
        body = bytes(self._body).rstrip()
        if body[:1] == b"{" and body[-1:] == b"}" and len(body) > 2 and _complete(self._receipts):
            receipt = json.dumps(combined(self._receipts)).encode()
            body = b'%b,"%b":%b}' % (body[:-1], KEY.encode(), receipt)
            length = str(len(body)).encode()
            start = {
                **start,
                "headers": [
                    (name, length if name.lower() == b"content-length" else value)
                    for name, value in start["headers"]
                ],
            }
        else:
            body = bytes(self._body)
        self._held = None
        await self._send(start)
        return {"type": "http.response.body", "body": body}

    def _stamp(self, body: bytes) -> bytes:
        # With several answers, only the end of the last one says something of all of them.
        if not _complete(self._receipts):
            return body
        return b"\n".join(self._stamp_line(line) for line in body.split(b"\n"))

    def _stamp_line(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        try:
            event = json.loads(line.removeprefix(b"data: "))
        except ValueError:  # Not vLLM's; whoever sent it knows why.
            return line
        if not _ends_an_answer(event):
            return line
        event[KEY] = combined(self._receipts)
        return b"data: " + json.dumps(event, separators=(",", ":")).encode()


def _ends_an_answer(event: dict[str, Any]) -> bool:
    if event.get("type") in ("message_delta", "message-end"):
        return True
    return any(choice.get("finish_reason") for choice in event.get("choices") or ())


def _kind(start: dict[str, Any]) -> str:
    """The media type of a response that may get a receipt, else an empty text."""
    headers = {name.lower(): value for name, value in start["headers"]}
    if start["status"] != 200 or b"content-encoding" in headers:
        return ""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return kind.decode("latin-1")


def _complete(receipts: Iterable[Receipt]) -> bool:
    return all(receipt.finished for receipt in receipts)


def _from_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def from_request(cls: type, *args: Any, **kwargs: Any) -> Any:
        response = original(cls, *args, **kwargs)
        receipts = collected.get()
        # Also called before anything is generated, for the first events of a stream.
        if receipts and _complete(receipts):
            setattr(response, KEY, combined(receipts))
            receipts.clear()  # which leaves the middleware nothing to add
        return response

    return from_request


# vllm.entrypoints.openai.responses.protocol.ResponsesResponse, which allows extra fields.
RESPONSES_RESPONSE = {"from_request": _from_request}
