"""Requests: validation, model aliases and the prefix-cache key.

Two gates see every request. `BaseServing._check_model` runs before a response has begun, so a bad
request is HTTP 400 when streaming too; `InputProcessor.process_inputs` covers `LLM` and every other
way in, and is where the decision is written into the request.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from grains_vllm.config import Catalogue, Steering, catalogue_of
from grains_vllm.selection import OFF, RESERVED, SALT_PREFIX, SelectionError, select


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        self.grains_catalogue = catalogue_of(vllm_config)

    return __init__


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        catalogue: Catalogue | None = self.grains_catalogue
        if catalogue is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        from vllm.exceptions import VLLMValidationError

        try:
            steering = select(params.extra_args, catalogue)
            request = original(self, request_id, prompt, params, *args, **kwargs)
            _write(request, steering)
        except SelectionError as error:
            raise VLLMValidationError(str(error), parameter="extra_args") from error
        return request

    return process_inputs


def _write(request: Any, steering: Steering | None) -> None:
    salt = request.cache_salt or ""
    _check_salt(salt)
    if steering is None:
        return
    if getattr(request, "resumable", False):
        raise SelectionError("steering: not supported for requests with streamed input")
    params = request.sampling_params
    # A new dict: the parameters may be a shallow copy of an object that the caller keeps.
    params.extra_args = {
        **(params.extra_args or {}),
        RESERVED: {
            "slot": steering.entry.slot_key,
            "strength": steering.strength,
            "positions": steering.positions,
        },
    }
    request.cache_salt = f"{SALT_PREFIX}{steering.digest}:{salt}"


def _check_salt(salt: str) -> None:
    if salt.startswith(SALT_PREFIX):
        raise SelectionError(f"cache_salt: {SALT_PREFIX!r} at the start is reserved")


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        catalogue = getattr(getattr(self.models, "input_processor", None), "grains_catalogue", None)
        if catalogue is not None:
            try:
                _resolve_alias(request, self.models.base_model_paths, catalogue)
                _check_request(request, catalogue)
            except SelectionError as error:
                return self.create_error_response(str(error), param=_field(error))
        return await original(self, request)

    return check_model


def _resolve_alias(request: Any, base_models: list[Any], catalogue: Catalogue) -> None:
    """Turns the model `BASE:truthful` into the model BASE with `steering: truthful`."""
    served = {base.name for base in base_models}
    model = request.model or ""
    bases = [base for base in served if model.startswith(f"{base}:")]
    if not bases or model in served:
        return
    base = max(bases, key=len)
    name = model.removeprefix(f"{base}:")
    if name not in catalogue.vectors:
        known = ", ".join(f"{base}:{vector}" for vector in sorted(catalogue.vectors))
        raise SelectionError(f"model: unknown alias {model!r}; known aliases: {known}")
    request.model = base
    if type(request).__name__.startswith(("Tokenize", "Detokenize")):
        return  # No forward pass, so nothing to steer.
    if not hasattr(request, "vllm_xargs"):
        raise SelectionError(f"model: the alias {model!r} cannot be used at this endpoint")
    xargs = dict(request.vllm_xargs or {})
    if xargs.setdefault("steering", name) != name:
        raise SelectionError(
            f"steering: {xargs['steering']!r} contradicts the model alias {model!r}"
        )
    request.vllm_xargs = xargs


def _check_request(request: Any, catalogue: Catalogue) -> None:
    xargs = getattr(request, "vllm_xargs", None) or {}
    select(xargs, catalogue)
    _check_salt(getattr(request, "cache_salt", None) or "")
    asked = xargs.get("steering", OFF) != OFF or (xargs.get("steering") and catalogue.default)
    if asked and getattr(request, "use_beam_search", False):
        # vLLM drops the request's own fields there; only the server's default gets through.
        raise SelectionError("steering: cannot be chosen per request together with use_beam_search")


def _field(error: SelectionError) -> str:
    return str(error).split(":", 1)[0].split(" ", 1)[0]


def _show_available_models(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        catalogue = self.input_processor.grains_catalogue
        if catalogue is not None:
            bases = {base.name for base in self.base_model_paths}
            models.data += [
                type(card)(
                    id=f"{card.id}:{name}",
                    root=card.root,
                    parent=card.id,
                    max_model_len=card.max_model_len,
                    permission=card.permission,
                )
                for card in models.data
                if card.id in bases
                for name in sorted(catalogue.vectors)
            ]
        return models

    return show_available_models


INPUT_PROCESSOR = {"__init__": _init, "process_inputs": _process_inputs}
BASE_SERVING = {"_check_model": _check_model}
MODELS = {"show_available_models": _show_available_models}
