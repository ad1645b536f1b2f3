"""Every HTTP route that vLLM attaches, and what becomes of a request's steering there.

A route is open, where frontend.py sees the whole request; or it drops something on the way, which
the middleware (door_http.py) then looks for; or it runs no request at all. A route that nobody has
decided about, such as one that a newer vLLM brings, takes no steering: a request that asks for some
there is refused, and so is every request where the server steers by itself.
"""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from grains_vllm.selection import XARGS, SelectionError, named, steering_keys

_CARRIER = (XARGS,)
_INTO_XARGS = (
    f"belongs into the request's {XARGS}, at the top of its JSON (where the OpenAI client puts "
    "what its argument extra_body holds)"
)
# The path of the HTTP request that is being answered, where nobody has decided about its route.
undecided: ContextVar[str | None] = ContextVar("grains_undecided", default=None)


@dataclass(frozen=True)
class Door:
    """What a route does with a request.

    Attributes:
        whole: frontend.py sees the request with every key that the client sent.
        alias: `model` reaches frontend.py, which knows the aliases.
        carrier: the keys that lead to the steering fields; empty where there is no place for them.
        hint: what a client should do instead of what is dropped here.
    """

    whole: bool = False
    alias: bool = True
    carrier: tuple[str, ...] = ()
    hint: str = "would be ignored at this endpoint; use the model alias"


OPEN = Door(whole=True, carrier=_CARRIER, hint=_INTO_XARGS)
# Runs no request of the engine, or only gives back or ends one.
IDLE = Door(whole=True)
UNDECIDED = Door(
    alias=False,
    hint="nobody has compared what this endpoint makes of steering; use /v1/chat/completions, "
    "/v1/completions or /v1/responses",
)
_MESSAGES = Door(carrier=_CARRIER, hint=f"belongs into the request's {XARGS}")
_MESSAGES_BEFORE_XARGS = Door(
    hint=f"would be ignored at this endpoint; use the model alias: this vLLM knows no {XARGS} here"
)

_DOORS: dict[str, Door] = {
    **dict.fromkeys(
        (
            "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/render",
            "/v1/completions", "/v1/completions/render", "/v1/responses", "/v1/responses/render",
            # These refuse aliases and fields in frontend.py, which sees both; a default steers.
            "/generative_scoring", "/v1/decisions", "/v1/systemone",
        ),
        OPEN,
    ),
    "/v1/messages": _MESSAGES,
    "/v1/messages/render": _MESSAGES,
    "/cohere/v2/chat": Door(),
    "/cohere/v2/chat/render": Door(),
    "/inference/v1/generate": Door(
        carrier=("sampling_params", "extra_args"),
        hint="would be ignored at this endpoint; put it into sampling_params.extra_args",
    ),
    "/invocations": Door(
        whole=True,
        alias=False,
        carrier=_CARRIER,
        hint=f"this endpoint takes no model from the body; name the vector in {XARGS}, or the "
        "alias in the header X-Amzn-SageMaker-Adapter-Identifier",
    ),
    # Speech: no model that can be steered has been compared here.
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations"), UNDECIDED),
    "/v1/realtime": UNDECIDED,
    # Engines that pool are not admitted.
    **dict.fromkeys(
        (
            "/classify", "/pooling", "/rerank", "/score", "/v1/embeddings", "/v1/rerank",
            "/v1/score", "/v2/embed", "/v2/rerank",
        ),
        UNDECIDED,
    ),
    **dict.fromkeys(
        (
            "/abort_requests", "/adapters", "/collective_rpc", "/detokenize", "/docs",
            "/docs/oauth2-redirect", "/fault_tolerance/apply", "/fault_tolerance/status",
            "/finish_weight_update", "/get_world_size", "/health", "/inference/v1/abort_requests",
            "/init_weight_transfer_engine", "/is_paused", "/is_scaling_elastic_ep", "/is_sleeping",
            "/kv_event_sources", "/load", "/metrics", "/openapi.json", "/pause", "/ping", "/ready",
            "/readyz", "/redoc", "/release_kv_cache_memory", "/reset_encoder_cache",
            "/reset_mm_cache", "/reset_prefix_cache", "/resume", "/scale_elastic_ep",
            "/server_info", "/shutdown_weight_transfer_engine", "/sleep",
            "/start_draft_weight_update", "/start_profile", "/start_weight_update",
            "/stop_profile", "/tokenize", "/tokenizer_info", "/update_weight_version",
            "/update_weights", "/v1/chat/completions/derender", "/v1/completions/derender",
            "/v1/load_lora_adapter", "/v1/messages/count_tokens", "/v1/models",
            "/v1/responses/{response_id}",
            "/v1/unload_lora_adapter", "/version", "/wake_up", "/weight_checker", "/weight_info",
        ),
        IDLE,
    ),
}  # fmt: skip
# More that take no new request: our own, adapters, files, the end of a stored response.
_IDLE = re.compile(r"(/(v1/grains|adapters|metrics|static)(/.*)?|/v1/responses/[^/]+/cancel)?")


def decided(path: str) -> bool:
    """Whether somebody has decided about a route, given as the template that it is attached by."""
    return path in _DOORS or _IDLE.fullmatch(path) is not None


def door_of(path: str) -> Door:
    """The door of a request's path, without --root-path."""
    path = path.rstrip("/")
    door = _DOORS.get(path)
    if door is None:
        return IDLE if _IDLE.fullmatch(path) else UNDECIDED
    if door is _MESSAGES and not _messages_know_xargs():
        return _MESSAGES_BEFORE_XARGS
    return door


@cache
def _messages_know_xargs() -> bool:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    return XARGS in AnthropicMessagesRequest.model_fields


def require_heard(body: Mapping[Any, Any], door: Door) -> None:
    """Refuses keys of ours, or what looks like them, wherever this door would drop them.

    Args:
        body: the request, or the keys of it that its class does not know.

    Raises:
        SelectionError: naming the key.
    """
    for key in steering_keys(body, lambda name: name not in _CONTENTS, door.carrier):
        raise SelectionError(f"{named(key)}: {door.hint}", key)


# What is the client's own, where any word may stand: a tool may well have a property "steering".
_CONTENTS = {
    "chat_template_kwargs", "content_parts", "documents", "ec_transfer_params", "features",
    "functions", "input", "items", "kv_transfer_params", "logit_bias", "messages", "metadata",
    "mm_processor_kwargs", "output_config", "prompt", "query", "questions", "response_format",
    "state", "structured_outputs", "system", "thinking", "token_ids", "tool_choice", "tools",
}  # fmt: skip
