"""Requests: validation, model aliases and the prefix-cache key.

Two gates see every request. `BaseServing._check_model` runs before a response has begun, so a bad
request is HTTP 400 when streaming too; `InputProcessor.process_inputs` covers `LLM` and every other
way in, and is where the decision is written into the request.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from grains_vllm.config import Catalogue, Steering, catalogue_of, short
from grains_vllm.errors import GrainsConfigError
from grains_vllm.selection import FIELDS, RESERVED, SALT_PREFIX, SelectionError, select


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
        catalogue = _of(self)
        if catalogue is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        from vllm.exceptions import VLLMValidationError

        try:
            steering = select(getattr(params, "extra_args", None), catalogue)
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
    border = _border(request, steering)
    params = request.sampling_params
    # A new dict: the parameters may be a shallow copy of an object that the caller keeps.
    params.extra_args = {
        **(params.extra_args or {}),
        RESERVED: {
            "slot": steering.entry.slot_key,
            "strength": steering.strength,
            "positions": steering.positions,
            "prompt_tokens": border,
        },
    }
    key = "" if steering.positions == "all" else border
    request.cache_salt = f"{SALT_PREFIX}{steering.digest}:{key}:{salt}"


def _border(request: Any, steering: Steering) -> int:
    """How many tokens count as prompt; the KV depends on it unless all tokens are steered alike.

    The next turn of a chat has this turn's answer in its prompt; blocks that were computed as
    generated tokens must not serve as prompt tokens then, nor the other way round.
    """
    from vllm.utils import length_from_prompt_token_ids_or_embeds

    length: int = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    if steering.prompt_tokens is not None and steering.prompt_tokens > length:
        raise SelectionError(
            f"steering_prompt_tokens: {short(steering.prompt_tokens)}, but the prompt has "
            f"{length} tokens"
        )
    return length if steering.prompt_tokens is None else steering.prompt_tokens


def _check_salt(salt: str) -> None:
    if salt.startswith(SALT_PREFIX):
        raise SelectionError(f"cache_salt: {SALT_PREFIX!r} at the start is reserved")


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        catalogue = _catalogue(self.models)
        if catalogue is not None:
            try:
                _resolve_alias(request, self.models.base_model_paths, catalogue)
                _check_request(request, catalogue)
            except SelectionError as error:
                return self.create_error_response(str(error), param=_field(error))
        return await original(self, request)

    return check_model


def _catalogue(models: Any) -> Catalogue | None:
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

    # A registry belongs to a server that renders prompts and has no engine.
    if isinstance(models, OpenAIModelRegistry):
        return None
    return _of(models.input_processor)


def _of(input_processor: Any) -> Catalogue | None:
    # None also for the processor of a plain engine that was there before steering was enabled.
    catalogue: Catalogue | None = getattr(input_processor, "grains_catalogue", None)
    return catalogue


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
        raise SelectionError(f"model: unknown alias {short(model)}; known aliases: {known}")
    request.model = base
    if type(request).__name__.startswith(("Tokenize", "Detokenize")):
        return  # No forward pass, so nothing to steer.
    if not _carries_xargs(request):
        raise SelectionError(f"model: the alias {model!r} cannot be used at this endpoint")
    xargs = dict(getattr(request, "vllm_xargs", None) or {})
    if str(xargs.setdefault("steering", name)).partition("=")[0] != name:
        raise SelectionError(
            f"steering: {short(xargs['steering'])} contradicts the model alias {model!r}"
        )
    request.vllm_xargs = xargs


def _carries_xargs(request: Any) -> bool:
    """Whether this endpoint hands `vllm_xargs` on to the sampling parameters."""
    kind = type(request)
    # A batch of chats keeps it among its extra fields and hands it to every chat.
    return "vllm_xargs" in kind.model_fields or kind.__name__ == "BatchChatCompletionRequest"


def _check_request(request: Any, catalogue: Catalogue) -> None:
    _check_salt(getattr(request, "cache_salt", None) or "")
    xargs = getattr(request, "vllm_xargs", None) or {}
    chosen = [name for name in FIELDS if name in xargs]
    if chosen and not _carries_xargs(request):
        raise SelectionError(f"{chosen[0]}: cannot be chosen at this endpoint")
    _check_misplaced(getattr(request, "model_extra", None) or {})
    steering = select(xargs, catalogue)
    if getattr(request, "use_beam_search", False):
        # vLLM drops the request's own fields there; only the server's default gets through.
        if chosen and (catalogue.default is not None or steering is not None):
            raise SelectionError(
                f"{chosen[0]}: cannot be chosen per request together with use_beam_search"
            )
        require_beam_search(catalogue)


def _check_misplaced(extra: Mapping[str, Any]) -> None:
    """Refuses fields of ours where vLLM ignores them: beside `vllm_xargs` instead of in it."""
    nested = [extra.get(name) for name in ("extra_body", "extra_args")]
    for place in (extra, *(value for value in nested if isinstance(value, dict))):
        for name in (*FIELDS, *(() if place is extra else ("vllm_xargs",))):
            if name in place:
                raise SelectionError(
                    f"{name}: belongs into the request's vllm_xargs (with the OpenAI client: "
                    'extra_body={"vllm_xargs": {...}})'
                )


def require_beam_search(catalogue: Catalogue) -> None:
    """Raises SelectionError where beam search would steer other tokens than the default says.

    Beam search sends every step as a new prompt, so that no token would count as generated.
    """
    if catalogue.default is not None and catalogue.default.positions != "all":
        raise SelectionError(
            f"use_beam_search: not possible with the server's default steering of positions "
            f"{catalogue.default.positions!r}"
        )


def _beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        catalogue = _of(self.llm_engine.input_processor)
        if catalogue is not None:
            from vllm.exceptions import VLLMValidationError

            try:
                require_beam_search(catalogue)
            except SelectionError as error:
                raise VLLMValidationError(str(error)) from error
        return original(self, *args, **kwargs)

    return beam_search


def _field(error: SelectionError) -> str:
    return str(error).split(":", 1)[0].split(" ", 1)[0]


def _init_models(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        catalogue = _catalogue(self)
        if catalogue is not None:
            names = {base.name for base in self.base_model_paths}
            hidden = names & {f"{base}:{vector}" for base in names for vector in catalogue.vectors}
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
        catalogue = _catalogue(self)
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
BEAM_SEARCH = {"beam_search": _beam_search}
MODELS = {"__init__": _init_models, "show_available_models": _show_available_models}
