"""ASGI middleware: refuses steering on routes that would drop it unseen (doors.py knows which).

Where frontend.py sees the whole request, which is nearly always, this looks at no body. Elsewhere
it looks at what the endpoint reads, as it reads it: so vLLM's own middleware, which asks for the
API key, comes first.
"""

import json
from typing import Any
from urllib.parse import unquote_plus

from starlette.responses import JSONResponse

from grains_vllm import doors, metrics
from grains_vllm.doors import Door
from grains_vllm.frontend import alias_of, fresh_request, state_of
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
            with fresh_request():
                looks = scope["type"] == "http" and scope["method"] not in _SAFE
                if looks and not (door.whole and door.alias):
                    await _Watched(door, scope, receive, send).run(self._app)
                else:
                    await self._app(scope, receive, send)
        finally:
            doors.undecided.reset(token)


class _Watched:
    """One request whose body is looked at as the endpoint reads it."""

    def __init__(self, door: Door, scope: Any, receive: Any, send: Any) -> None:
        self._door, self._scope = door, scope
        self._receive, self._send = receive, send
        self._body = bytearray()
        self._refusal: SelectionError | None = None
        self._started = self._answered = False

    async def run(self, app: Any) -> None:
        try:
            await app(self._scope, self._next, self._pass)
        except SelectionError as error:
            if error is not self._refusal:
                raise
            await self._refuse(error)

    async def _next(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request" and not self._started:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                try:
                    _require_heard(bytes(self._body), self._door, self._scope["app"].state)
                except SelectionError as error:
                    # Ends the endpoint's reading; whatever it then answers gives way to this.
                    self._refusal = error
                    raise
                self._body.clear()
        return message

    async def _pass(self, message: Any) -> None:
        if self._refusal is not None:
            await self._refuse(self._refusal)
            return
        self._started = True
        await self._send(message)

    async def _refuse(self, error: SelectionError) -> None:
        if self._answered:
            return
        self._answered = True
        metrics.refused(error.field, str(error))
        facts = {
            "message": str(error), "type": "BadRequestError", "param": error.field, "code": 400,
        }  # fmt: skip
        # Anthropic's clients look for the outer type, all others for what is inside.
        answer = JSONResponse({"type": "error", "error": facts}, status_code=400)
        await answer(self._scope, self._receive, self._send)


def _path(scope: Any) -> str:
    """The path as routes know it, without --root-path."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _require_heard(body: bytes, door: Door, state: Any) -> None:
    models = getattr(state, "openai_serving_models", None)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        # Whatever else is wrong is vLLM's to say; a form of a known endpoint is no JSON.
        if door is doors.UNDECIDED and _speaks_of_steering(body, models):
            raise SelectionError(f"steering: {door.hint}") from None
        return
    if not isinstance(content, dict):
        return
    if not door.whole:
        doors.require_heard(content, door)
    model = content.get("model")
    if door.alias or models is None or not isinstance(model, str):
        return
    if (served := state_of(models)) is not None and alias_of(model, models, served.catalogue):
        raise SelectionError(f"model: {door.hint}")


def _speaks_of_steering(form: bytes, models: Any) -> bool:
    text = unquote_plus(form.decode("utf-8", "replace"))
    bases = [] if models is None else [base.name for base in models.base_model_paths]
    return "steering" in text.casefold() or any(f"{base}:" in text for base in bases)
