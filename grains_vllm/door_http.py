"""Refuses steering fields at endpoints whose request classes drop what they do not know.

There neither gate of frontend.py could see them, and the request would be answered as if it had
asked for nothing. Everywhere else this looks at no body.
"""

import json
from typing import Any

from starlette.responses import JSONResponse

from grains_vllm import metrics

_GENERATE = "/inference/v1/generate"
_MESSAGES = "/v1/messages"
_HINTS = {
    _GENERATE: "put it into sampling_params.extra_args",
    _MESSAGES: "use the model alias; this vLLM knows no vllm_xargs here",
}


class DoorMiddleware:
    """For vLLM's --middleware list."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._paths = tuple(path for path in _HINTS if path == _GENERATE or not _messages_hear())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"] if scope["type"] == "http" and scope["method"] == "POST" else ""
        deaf = next((end for end in self._paths if path.endswith(end)), None)
        if deaf is None:
            await self._app(scope, receive, send)
            return
        body, again = await _read(receive)
        field = _dropped(body)
        if field is None:
            await self._app(scope, again, send)
            return
        message = f"{field}: would be ignored at this endpoint; {_HINTS[deaf]}"
        metrics.refused(field, message)
        error = {"message": message, "type": "BadRequestError", "param": field, "code": 400}
        await JSONResponse({"error": error}, status_code=400)(scope, again, send)


def _messages_hear() -> bool:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    return "vllm_xargs" in AnthropicMessagesRequest.model_fields


def _dropped(body: bytes) -> str | None:
    """The first key of ours at the top of a JSON body; whatever else is wrong is vLLM's to say."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    keys = content if isinstance(content, dict) else ()
    return next((k[:80] for k in keys if k == "vllm_xargs" or k.startswith("steering")), None)


async def _read(receive: Any) -> tuple[bytes, Any]:
    """The whole body, and a `receive` that gives it out once more."""
    messages = []
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body"):
            break
    body = b"".join(message.get("body", b"") for message in messages)

    async def again() -> Any:
        return messages.pop(0) if messages else await receive()

    return body, again
