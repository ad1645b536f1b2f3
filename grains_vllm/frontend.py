"""Requests: validation, model aliases, and the marker that scheduler and workers obey.

Two gates see every request. `BaseServing._check_model` runs before a response has begun, so a bad
request is HTTP 400 when streaming too; `InputProcessor.process_inputs` covers `LLM` and every other
way in, and is where the decision is written into the request. Both look at one snapshot: what the
first has let through must not fail at the second, where streams have begun and every refusal is a
400.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from http import HTTPStatus
from typing import Any

from grains_vllm import doors, metrics
from grains_vllm.catalogue import Catalogue
from grains_vllm.checks import closest, listed, short
from grains_vllm.errors import GrainsConfigError
from grains_vllm.likeness import skeleton
from grains_vllm.marker import build
from grains_vllm.receipts import in_beam_search
from grains_vllm.registry import Registry, Snapshot
from grains_vllm.selection import (
    BARE,
    CANARY_KEY,
    CHECKED,
    FIELDS,
    RESERVED,
    XARGS,
    Choice,
    SelectionError,
    SteeringDisabled,
    encodable,
    named,
    select,
)

# Of the HTTP request that is being answered: the snapshot that it was checked by, and when.
_checked_by: ContextVar[tuple[Snapshot, float] | None] = ContextVar("grains_snapshot", default=None)
# Far less than workers keep a vector that has left the catalogue (bank.GRACE).
_STALE = 10.0  # seconds


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        self.grains_registry = Registry.of(vllm_config)

    return __init__


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        state = _of(self)
        if state is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        from vllm.exceptions import VLLMValidationError

        try:
            asked = getattr(params, "extra_args", None)
            state = _as_checked(state)
            choice = select(asked, state.catalogue, state.enabled, _identity(request_id))
            if (path := doors.undecided.get()) is not None:
                _require_plain(path, asked, choice)
            request = original(self, request_id, prompt, params, *args, **kwargs)
            _write(request, choice, state.catalogue)
        except SelectionError as error:
            metrics.refused(error.field, str(error))
            raise VLLMValidationError(str(error), parameter="extra_args") from error
        return request

    return process_inputs


@contextmanager
def fresh_request() -> Iterator[None]:
    """Begins an HTTP request that knows nothing of the one before it on the same connection, in
    whose context a server may start it."""
    checked, beams = _checked_by.set(None), in_beam_search.set(False)
    try:
        yield
    finally:
        _checked_by.reset(checked)
        in_beam_search.reset(beams)


def _as_checked(now: Snapshot) -> Snapshot:
    """The snapshot that the first gate saw a moment ago, if this request has passed it."""
    if (checked := _checked_by.get()) is None:
        return now
    then, when = checked
    # Long ago, its vectors may be gone; but it had entered before steering was switched off.
    return then if time.monotonic() - when <= _STALE else replace(now, enabled=then.enabled)


def _require_plain(path: str, asked: Any, choice: Choice) -> None:
    """Refuses steering on a route that doors.py does not know: it may have dropped what was said,
    an alias or `steering: none` too."""
    field = next((name for name in FIELDS if name in (asked or {})), None)
    if field is not None or choice.steering is not None or choice.fraction is not None:
        why = field or f"the server's {choice.source} steering"
        raise SelectionError(
            f"{why}: {short(path)} is no endpoint where steering has been compared; use "
            "/v1/chat/completions, /v1/completions or /v1/responses",
            field or "steering",
        )


def _identity(request_id: str) -> str:
    """The HTTP request's id: /v1/completions numbers its prompts, which belong on one side."""
    return request_id.rpartition("-")[0] if request_id.startswith("cmpl-") else request_id


def _write(request: Any, choice: Choice, catalogue: Catalogue) -> None:
    params = request.sampling_params
    if params is None:
        return
    if choice.steering is not None and getattr(request, "resumable", False):
        raise SelectionError("steering: not supported for requests with streamed input")
    marker = build(choice, _border(request, choice), _held(request), catalogue.unchecked)
    # A new dict: the parameters may be a shallow copy of an object that the caller keeps.
    params.extra_args = {**(params.extra_args or {}), CHECKED: True}
    if marker is not None:
        params.extra_args[RESERVED] = marker


def _border(request: Any, choice: Choice) -> int:
    """How many tokens count as prompt for the positions."""
    from vllm.utils import length_from_prompt_token_ids_or_embeds

    length: int = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    given = choice.steering.prompt_tokens if choice.steering else None
    if given is None:
        return length
    if given > length:
        raise SelectionError(
            f"steering_prompt_tokens: {short(given)}, but the prompt has {length} tokens"
        )
    return given


def _held(request: Any) -> Iterator[tuple[str, int, int]]:
    """Which prompt tokens hold features of images or other media: (modality, start, end).

    What only stands around them, such as Gemma's line breaks, is text like any other.
    """
    for feature in request.mm_features or ():
        for first, last in feature.mm_position.extract_embeds_range():
            yield feature.modality, first, last + 1


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        state = state_of(getattr(self, "models", None))
        if state is not None:
            try:
                _resolve_alias(request, self.models, state.catalogue)
                _check_request(request, state)
                _checked_by.set((state, time.monotonic()))
            except SelectionError as error:
                metrics.refused(error.field, str(error))
                return self.create_error_response(
                    str(error), **_error_status(error), param=error.field
                )
        return await original(self, request)

    return check_model


def _error_status(error: SelectionError) -> dict[str, Any]:
    if isinstance(error, SteeringDisabled):
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return {"err_type": "ServiceUnavailableError", "status_code": status}
    return {}


def state_of(models: Any) -> Snapshot | None:
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

    # A registry belongs to a server that renders prompts and has no engine.
    if isinstance(models, OpenAIModelRegistry):
        return None
    return _of(getattr(models, "input_processor", None))


def _of(input_processor: Any) -> Snapshot | None:
    # None also for the processor of a plain engine that was there before steering was enabled.
    registry: Registry | None = getattr(input_processor, "grains_registry", None)
    return None if registry is None else registry.snapshot()


def alias_of(model: str, models: Any, catalogue: Catalogue) -> tuple[str, str] | None:
    """(BASE, vector) of the model name `BASE:vector`, or None for any other name.

    BASE is a served model or a LoRA adapter.

    Args:
        models: vllm.entrypoints.openai.models.serving.OpenAIServingModels.

    Raises:
        SelectionError: BASE has no such alias, or an adapter has the same name.
    """
    served = {base.name for base in models.base_model_paths}
    adapters = set(models.lora_requests)
    bases = [base for base in served | adapters if model.startswith(f"{base}:")]
    if not bases or model in served:
        return None
    base = max(bases, key=len)
    name = model.removeprefix(f"{base}:")
    if name in catalogue.vectors and model in adapters:
        raise SelectionError(
            f"model: {short(model)} is a LoRA adapter and the alias of a vector; name the vector "
            "in vllm_xargs, or rename the adapter"
        )
    if model in adapters:
        return None
    if name not in catalogue.vectors:
        known = listed(catalogue.vectors, name, f"{base}:")
        close = closest(name, catalogue.vectors)
        hint = "" if close is None else f" (did you mean {f'{base}:{close}'!r}?)"
        raise SelectionError(f"model: unknown alias {short(model)}{hint}; known aliases: {known}")
    return base, name


def _resolve_alias(request: Any, models: Any, catalogue: Catalogue) -> None:
    """Turns the model `BASE:truthful` into the model BASE with `steering: truthful`."""
    model = request.model or ""
    if (alias := alias_of(model, models, catalogue)) is None:
        return
    request.model, name = alias
    if type(request).__name__.startswith(("Tokenize", "Detokenize", "Derender")):
        return  # No forward pass, so nothing to steer.
    if not _carries_xargs(request):
        raise SelectionError(f"model: the alias {model!r} cannot be used at this endpoint")
    xargs = dict(_xargs(request))
    parts = str(xargs.setdefault("steering", name)).split(",")
    if name not in (part.partition("=")[0].strip() for part in parts):
        raise SelectionError(
            f"steering: {short(xargs['steering'])} contradicts the model alias {model!r}"
        )
    request.vllm_xargs = xargs


def _carries_xargs(request: Any) -> bool:
    """Whether this endpoint hands `vllm_xargs` on to the sampling parameters."""
    kind = type(request)
    # A batch of chats keeps it among its extra fields and hands it to every chat.
    return XARGS in kind.model_fields or kind.__name__ == "BatchChatCompletionRequest"


def _xargs(request: Any) -> Mapping[str, Any]:
    """What a request says in `vllm_xargs`, or in /inference/v1/generate's place for it."""
    params = getattr(request, "sampling_params", None)
    value = getattr(request, XARGS, None) if params is None else params.extra_args
    if not isinstance(value, Mapping | None):
        raise SelectionError(f"{XARGS}: {short(value)} is not a mapping of fields")
    return value or {}


def _check_request(request: Any, state: Snapshot) -> None:
    catalogue = state.catalogue
    xargs = _xargs(request)
    chosen = [name for name in FIELDS if name in xargs]
    if chosen and not _carries_xargs(request) and not hasattr(request, "sampling_params"):
        raise SelectionError(f"{chosen[0]}: cannot be chosen at this endpoint")
    unknown = getattr(request, "model_extra", None) or {}
    doors.require_heard(unknown, doors.OPEN)
    for key in unknown if chosen else ():
        if (bare := skeleton(key)) in BARE:
            raise SelectionError(f"{named(key)}: say steering_{bare} in {XARGS}", key)
    steering = select(xargs, catalogue, state.enabled).steering
    if getattr(request, "use_beam_search", False):
        in_beam_search.set(True)
        # vLLM drops the request's own fields there; only the server's default gets through.
        if chosen and (catalogue.default is not None or steering is not None):
            raise SelectionError(
                f"{chosen[0]}: cannot be chosen per request together with use_beam_search"
            )
        require_beam_search(state)
    user = getattr(request, "user", None)
    if (
        catalogue.canary is not None
        and user
        and CANARY_KEY not in xargs
        and _carries_xargs(request)
    ):
        request.vllm_xargs = {**xargs, CANARY_KEY: encodable(str(user))[:512]}


def require_beam_search(state: Snapshot) -> None:
    """Raises SelectionError where beam search would steer other tokens than the operator says.

    Beam search sends every step as a new prompt of its own, so that no token would count as
    generated, and a canary would throw its dice for each.
    """
    default = state.catalogue.default if state.enabled else None
    places = sorted({term.positions for term in default.terms} - {"all"}) if default else []
    if places:
        raise SelectionError(
            f"use_beam_search: not possible with the server's default steering of positions "
            f"{places[0]!r}"
        )
    if state.enabled and state.catalogue.canary is not None:
        raise SelectionError("use_beam_search: not possible with the server's canary")


def _beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = _of(getattr(getattr(self, "llm_engine", None), "input_processor", None))
        if state is not None:
            from vllm.exceptions import VLLMValidationError

            try:
                require_beam_search(state)
            except SelectionError as error:
                raise VLLMValidationError(str(error)) from error
        return original(self, *args, **kwargs)

    return beam_search


def _init_models(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        state = state_of(self)
        if state is not None:
            names = {base.name for base in self.base_model_paths}
            hidden = names & {
                f"{base}:{vector}" for base in names for vector in state.catalogue.vectors
            }
            if hidden:
                raise GrainsConfigError(
                    f"--served-model-name {min(hidden)}: this is the alias of a steering vector, "
                    "which it would hide"
                )

    return __init__


def _show_available_models(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        state = state_of(self)
        if state is not None:
            models.data += [
                type(card)(
                    id=f"{card.id}:{name}",
                    root=card.root,
                    parent=card.id,
                    max_model_len=card.max_model_len,
                    permission=card.permission,
                )
                for card in tuple(models.data)
                for name in sorted(state.catalogue.vectors)
            ]
        return models

    return show_available_models


INPUT_PROCESSOR = {"__init__": _init, "process_inputs": _process_inputs}
BASE_SERVING = {"_check_model": _check_model}
BEAM_SEARCH = {"beam_search": _beam_search}
MODELS = {"__init__": _init_models, "show_available_models": _show_available_models}
