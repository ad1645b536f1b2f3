"""What a request asks for: from `vllm_xargs` / `SamplingParams.extra_args` to a Steering."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from grains_vllm.config import Catalogue, Steering, one_of, short, strength, suggestion
from grains_vllm.vectors import POSITIONS

FIELDS = ("steering", "steering_strength", "steering_positions", "steering_prompt_tokens")
_FIELDS = ", ".join(FIELDS)
OFF = "none"
# Written by the front end for the workers; a client that sends it could pose as one.
RESERVED = "grains"
SALT_PREFIX = "grains:"


class SelectionError(ValueError):
    """A request that cannot be steered; the message names the field and what is allowed."""


def select(extra_args: Mapping[str, Any] | None, catalogue: Catalogue) -> Steering | None:
    """Says how a request is steered, or None if it is not.

    Args:
        extra_args: the request's `vllm_xargs` over HTTP, `SamplingParams.extra_args` offline.

    Raises:
        SelectionError: an unknown name, a bad value, a reserved or misspelt key.
    """
    asked = {} if extra_args is None else extra_args
    _check_keys(asked)
    fields = {name: asked[name] for name in FIELDS if name in asked}
    if not fields:
        return _effective(catalogue.default)
    if fields.get("steering") == OFF:
        if len(fields) > 1:
            other = ", ".join(name for name in fields if name != "steering")
            raise SelectionError(f"steering is 'none', which leaves no use for {other}")
        return None
    steering = catalogue.default
    if "steering" in fields:
        steering = parse_steering(fields["steering"], catalogue)
    if steering is None:
        raise SelectionError(
            f"{next(iter(fields))} was given without steering; {_known(catalogue)}"
        )
    value, positions = steering.strength, steering.positions
    if "steering_strength" in fields:
        if "=" in str(fields.get("steering", "")):
            raise SelectionError(
                f"steering_strength: steering={short(fields['steering'])} sets the strength too"
            )
        value = strength(fields["steering_strength"], "steering_strength", SelectionError)
    if "steering_positions" in fields:
        positions = one_of(
            fields["steering_positions"], POSITIONS, "steering_positions", SelectionError
        )
    border = None
    if "steering_prompt_tokens" in fields:
        border = _prompt_tokens(fields["steering_prompt_tokens"], positions)
    return _effective(Steering(steering.entry, value, positions, border))


def parse_steering(value: Any, catalogue: Catalogue) -> Steering:
    """Reads `NAME` or `NAME=STRENGTH`; what it leaves out comes from the catalogue entry."""
    if not isinstance(value, str):
        raise SelectionError(f"steering: {short(value)} is not text; {_known(catalogue)}")
    if "," in value:
        raise SelectionError(
            f"steering: {short(value)} names several vectors; one per request is allowed"
        )
    name, equals, number = value.partition("=")
    entry = catalogue.vectors.get(name)
    if entry is None:
        close = suggestion(name, list(catalogue.vectors))
        raise SelectionError(f"steering: unknown vector {short(name)}{close}; {_known(catalogue)}")
    if not equals:
        return Steering(entry, entry.strength, entry.positions)
    try:
        parsed = float(number)
    except ValueError:
        raise SelectionError(
            f"steering: {short(number)} in {short(value)} is not a number"
        ) from None
    return Steering(entry, strength(parsed, "steering", SelectionError), entry.positions)


def _prompt_tokens(value: Any, positions: str) -> int:
    if type(value) is not int or value < 1:
        raise SelectionError(
            f"steering_prompt_tokens: {short(value)} is not a whole number of 1 or more"
        )
    if positions == "all":
        raise SelectionError(
            "steering_prompt_tokens: of no use with steering_positions 'all', which steers "
            "prompt and answer alike"
        )
    return value


def _check_keys(asked: Mapping[str, Any]) -> None:
    for key in asked:
        # Other keys belong to other plugins, unless they look like one of ours gone wrong.
        if key in FIELDS or not isinstance(key, str):
            continue
        if key == RESERVED or key.startswith(f"{RESERVED}_"):
            raise SelectionError(f"{key[:80]}: this key is reserved; allowed: {_FIELDS}")
        lower = key.casefold()
        close = suggestion(lower, FIELDS, cutoff=0.85) if lower.startswith("ste") else ""
        if lower in ("strength", "positions") and "steering" in asked:
            close = f" (did you mean 'steering_{lower}'?)"
        if close or lower.startswith("steering"):
            raise SelectionError(f"{key[:80]}: unknown key{close}; known keys: {_FIELDS}")


def _effective(steering: Steering | None) -> Steering | None:
    # Strength 0 (in the workers' float32) leaves every bit as it is, so such a request shares the
    # plain prefix cache.
    return steering if steering is not None and np.float32(steering.strength) != 0 else None


def _known(catalogue: Catalogue) -> str:
    return f"known vectors: {', '.join(sorted(catalogue.vectors))}"
