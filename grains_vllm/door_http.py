"""ASGI middleware: refuses steering on routes that would drop it unseen (doors.py knows which).

Where frontend.py sees the whole request, which is nearly always, this looks at no body.
"""

import json
from typing import Any

from starlette.responses import JSONResponse

from grains_vllm import doors, metrics
from grains_vllm.doors import Door
from grains_vllm.frontend import alias_of, state_of
from grains_vllm.selection import SelectionError

_SAFE = ("GET", "HEAD", "OPTIONS")  # no request of the engine comes with these


class DoorMiddleware:
    """For vLLM's --middleware list; the app's state.openai_serving_models knows the aliases."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path = _path(scope)
        door = doors.door_of(path)
        token = doors.undecided.set(path if door is doors.UNDECIDED else None)
        try:
            read = scope["type"] == "http" and scope["method"] not in _SAFE
            if read and not (door.whole and door.alias):
                body, receive = await _read(receive)
                try:
                    _require_heard(body, door, scope["app"].state)
                except SelectionError as error:
                    await _refuse(error, scope, receive, send)
                    return
            await self._app(scope, receive, send)
        finally:
            doors.undecided.reset(token)


def _path(scope: Any) -> str:
    """The path as routes know it, without --root-path."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _require_heard(body: bytes, door: Door, state: Any) -> None:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        # Whatever else is wrong is vLLM's to say; a form of a known endpoint is no JSON.
        if door is doors.UNDECIDED and b"steering" in body.lower():
            raise SelectionError(f"steering: {door.hint}") from None
        return
    if not isinstance(content, dict):
        return
    if not door.whole:
        doors.require_heard(content, door)
    models = getattr(state, "openai_serving_models", None)
    model = content.get("model")
    if door.alias or models is None or not isinstance(model, str):
        return
    if (served := state_of(models)) is not None and alias_of(model, models, served.catalogue):
        raise SelectionError(f"model: {door.hint}")


async def _refuse(error: SelectionError, scope: Any, receive: Any, send: Any) -> None:
    metrics.refused(error.field, str(error))
    facts = {
        "message": str(error), "type": "BadRequestError", "param": error.field, "code": 400,
    }  # fmt: skip
    await JSONResponse({"error": facts}, status_code=400)(scope, receive, send)


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
