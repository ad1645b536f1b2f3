"""What a request asks for: from `vllm_xargs` / `SamplingParams.extra_args` to a Steering."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grains_vllm import checks
from grains_vllm.catalogue import Catalogue, Limits, Steering, Term, VectorEntry
from grains_vllm.checks import listed, short, suggestion
from grains_vllm.likeness import likeness, skeleton
from grains_vllm.positions import Positions

XARGS = "vllm_xargs"  # where HTTP requests carry the fields
FIELDS = (
    "steering",
    "steering_strength",
    "steering_positions",
    "steering_layers",
    "steering_prompt_tokens",
    "steering_canary_key",
)
CANARY_KEY = "steering_canary_key"
_FIELDS = ", ".join(FIELDS)
OFF = "none"
# Written by the front end for scheduler and workers; a client that sends it could pose as one.
RESERVED = "grains"
# Written into every request, steered or not: the engine core refuses one without it, since the
# front end that let it through did not ask what it wants.
CHECKED = "grains_checked"


class SelectionError(ValueError):
    """A request that cannot be steered; the message names the field and what is allowed.

    Attributes:
        field: which one; by default the word that the message begins with.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(encodable(message))  # It quotes keys, and ends in JSON and in logs.
        first = message.split(":", 1)[0].split(" ", 1)[0]
        self.field = first if field is None else encodable(field[:80])


class SteeringDisabled(SelectionError):
    """A request for steering while the operator has switched it off."""


@dataclass(frozen=True)
class Choice:
    """How a request is steered and who decided it.

    Attributes:
        steering: None for a request that is left alone.
        source: "request", "default" or "canary".
        fraction: the canary's share, for a request on which it has thrown its dice.
    """

    steering: Steering | None
    source: str = "request"
    fraction: float | None = None


def select(
    extra_args: Mapping[str, Any] | None,
    catalogue: Catalogue,
    enabled: bool = True,
    identity: str = "",
) -> Choice:
    """Says how a request is steered.

    Args:
        extra_args: the request's `vllm_xargs` over HTTP, `SamplingParams.extra_args` offline.
        enabled: whether the operator lets requests be steered.
        identity: what the canary throws its dice on where the request has no key of its own.

    Raises:
        SelectionError: an unknown name, a bad value, a reserved or misspelt key.
        SteeringDisabled: it asks for steering, which is switched off.
    """
    asked = {} if extra_args is None else extra_args
    _check_keys(asked, catalogue.vectors)
    key = _canary_key(asked[CANARY_KEY]) if CANARY_KEY in asked else identity
    fields = {name: asked[name] for name in FIELDS if name in asked and name != CANARY_KEY}
    if not fields:
        return _unasked(catalogue, enabled, key)
    steering = _requested(fields, catalogue)
    if steering is not None and not enabled:
        raise SteeringDisabled(
            "steering: switched off by the operator; ask again later, or without steering"
        )
    return Choice(steering)


def parse_steering(
    value: Any, vectors: Mapping[str, VectorEntry], limits: Limits
) -> tuple[Term, ...]:
    """Reads `NAME[=STRENGTH][,...]`; what it leaves out comes from the catalogue entries."""
    if not isinstance(value, str):
        raise SelectionError(f"steering: {short(value)} is not text; {_known(vectors)}")
    parts = value.split(",")
    if len(parts) > limits.max_vectors_per_request:
        raise SelectionError(
            f"steering: {short(value)} combines {len(parts)} vectors; this server allows "
            f"{limits.max_vectors_per_request} (max_vectors_per_request in its YAML)"
        )
    terms = tuple(_term(part, value, vectors) for part in parts)
    names = [term.entry.name for term in terms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SelectionError(f"steering: {short(value)} names {twice[0]!r} twice")
    return terms


def _term(part: str, whole: str, vectors: Mapping[str, VectorEntry]) -> Term:
    name, equals, number = (text.strip() for text in part.partition("="))
    entry = vectors.get(name)
    if entry is None:
        close = suggestion(name, vectors)
        if ":" in name:
            close = " (a strength is written NAME=STRENGTH)"
        raise SelectionError(
            f"steering: unknown vector {short(name)}{close}; {_known(vectors, name)}"
        )
    if not equals:
        return Term(entry, entry.strength, entry.positions, entry.layers)
    try:
        if not number.isascii() or "_" in number:
            raise ValueError("Python reads such numbers, nobody else does")
        parsed = float(number)
    except ValueError:
        raise SelectionError(
            f"steering: {short(number)} in {short(whole)} is not a number"
        ) from None
    value = checks.strength(parsed, "steering", SelectionError)
    return Term(entry, value, entry.positions, entry.layers)


def _requested(fields: Mapping[str, Any], catalogue: Catalogue) -> Steering | None:
    if fields.get("steering") == OFF:
        if len(fields) > 1:
            other = ", ".join(name for name in fields if name != "steering")
            raise SelectionError(f"steering is 'none', which leaves no use for {other}")
        return None
    if "steering" in fields:
        terms = parse_steering(fields["steering"], catalogue.vectors, catalogue.limits)
    elif catalogue.default is not None:
        terms = catalogue.default.terms
    else:
        raise SelectionError(
            f"{next(iter(fields))} was given without steering; {_known(catalogue.vectors)}"
        )
    if "steering_strength" in fields:
        value = _strength(fields["steering_strength"], fields.get("steering"), terms)
        terms = (replace(terms[0], strength=value),)
    if "steering_positions" in fields:
        places = checks.positions(
            fields["steering_positions"], "steering_positions", SelectionError
        )
        terms = tuple(replace(term, positions=places) for term in terms)
    if "steering_layers" in fields:
        terms = tuple(_narrowed(term, fields["steering_layers"]) for term in terms)
    border = None
    if "steering_prompt_tokens" in fields:
        border = _prompt_tokens(fields["steering_prompt_tokens"], terms)
    return _effective(Steering.of(terms, border))


def _unasked(catalogue: Catalogue, enabled: bool, identity: str) -> Choice:
    if not enabled:
        return Choice(None)
    default, canary = catalogue.default, catalogue.canary
    default = default and _effective(default)
    fraction = None
    if canary is not None:
        fraction = canary.fraction
        if canary.takes(identity):
            return Choice(_effective(canary.steering), "canary", fraction)
    if default is not None:
        return Choice(default, "default", fraction)
    return Choice(None, "request" if canary is None else "canary", fraction)


def _strength(value: Any, spec: Any, terms: tuple[Term, ...]) -> float:
    if len(terms) > 1:
        raise SelectionError(
            "steering_strength: fits one vector only; for several say "
            "steering='NAME=STRENGTH,NAME=STRENGTH'"
        )
    if "=" in str(spec or ""):
        raise SelectionError(f"steering_strength: steering={short(spec)} sets the strength too")
    return checks.strength(value, "steering_strength", SelectionError)


def _narrowed(term: Term, value: Any) -> Term:
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not layers or any(type(n) is not int for n in layers):
        raise SelectionError(
            f"steering_layers: {short(value)} is not a layer number or a list of them"
        )
    if missing := sorted(set(layers) - set(term.layers)):
        raise SelectionError(
            f"steering_layers: {short(missing)} are not served for {term.entry.name!r}, whose "
            f"layers are {list(term.layers)}"
        )
    return replace(term, layers=tuple(sorted(set(layers))))


def _prompt_tokens(value: Any, terms: tuple[Term, ...]) -> int:
    if type(value) is not int or value < 1:
        raise SelectionError(
            f"steering_prompt_tokens: {short(value)} is not a whole number of 1 or more"
        )
    if not any(Positions.parse(term.positions).needs_border for term in terms):
        raise SelectionError(
            "steering_prompt_tokens: of no use with steering_positions 'all', 'text' and 'image', "
            "to which it makes no difference where the prompt ends"
        )
    return value


def _canary_key(value: Any) -> str:
    # Half a surrogate pair is valid in JSON and in Python, but in no message between processes.
    if not isinstance(value, str) or not 0 < len(value) <= 512 or value != encodable(value):
        raise SelectionError(f"{CANARY_KEY}: {short(value)} is not text of 1 to 512 characters")
    return value


def encodable(text: str) -> str:
    """The text with whatever UTF-8 cannot hold spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _check_keys(asked: Mapping[str, Any], vectors: Mapping[str, VectorEntry]) -> None:
    for key in asked:
        # Other keys belong to other plugins, unless they look like one of ours gone wrong.
        if key in FIELDS or not isinstance(key, str):
            continue
        plain = unicodedata.normalize("NFKC", key[:80]).strip().casefold()
        if plain == RESERVED or plain.startswith(f"{RESERVED}_"):
            raise SelectionError(f"{named(key)}: this key is reserved; allowed: {_FIELDS}", key)
        bare = skeleton(key)
        close = None
        if bare.startswith("ste") or not bare.isascii():
            close = likeness(key, FIELDS, 0.75 if bare == "steer" else 0.85)
        if bare in BARE and "steering" in asked:
            close = f"steering_{bare}"
        if key in vectors or bare in ("vector", "vectors"):
            close = "steering"
        if close or bare.startswith("steering"):
            hint = f" (did you mean {close!r}?)" if close else ""
            raise SelectionError(f"{named(key)}: unknown key{hint}; known keys: {_FIELDS}", key)
    others = {key: value for key, value in asked.items() if key not in FIELDS}
    for key in steering_keys(others, lambda name: skeleton(name) in _WRAPPERS):
        raise SelectionError(
            f"{named(key)}: stands too deep to be heard; known keys: {_FIELDS}", key
        )


# What clients wrap fields in, by letters and digits alone.
_WRAPPERS = {
    "extrabody", "extraargs", "vllmextraargs", "samplingparams", "modelkwargs", "kwargs", "xargs",
    "parameters", "options",
}  # fmt: skip
# What a field is called without its first word.
BARE = ("strength", "positions", "layers")
_MOST_KEYS = 1000


def steering_keys(
    body: Mapping[Any, Any], enters: Callable[[str], bool], carrier: tuple[str, ...] = ()
) -> Iterator[str]:
    """The keys that stand for steering, or could be taken for it, in a request and what it holds.

    Args:
        enters: whether to look into the mapping or list under a key.
        carrier: the one path to fields that is heard; what is there is not looked at.

    Raises:
        SelectionError: the request has more keys than anybody would write.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), body)]
    seen = 0
    while waiting:
        above, part = waiting.pop()
        if isinstance(part, list):
            waiting += [(above, inner) for inner in part if type(inner) in (dict, list)]
            seen += len(waiting)
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if not isinstance(key, str) or (*above, key) == carrier:
                continue
            seen += 1
            if asks_for_steering(key):
                yield key
            elif isinstance(value, Mapping | list) and enters(key):
                waiting.append(((*above, key), value))
            if seen > _MOST_KEYS:
                break
        if seen > _MOST_KEYS:
            raise SelectionError(f"request: it holds more than {_MOST_KEYS} unknown keys")


def asks_for_steering(key: str) -> bool:
    """Whether a key is one of ours, or could be taken for one."""
    bare = skeleton(key)
    if bare.startswith("steering") or bare in ("steer", RESERVED):
        return True
    # Slips come late in a word; "string" is none.
    may_slip = bare.startswith(("ste", "vl")) or not bare.isascii()
    return may_slip and likeness(key, _NAMES) is not None


_NAMES = (XARGS, *FIELDS)


def named(key: str) -> str:
    """A key for messages: as it is, or quoted where it would not show as what it is."""
    return key[:80] if key.isascii() and key.isidentifier() else short(key)


def _effective(steering: Steering) -> Steering | None:
    # Strength 0 (in the workers' float32) leaves every bit as it is, so such a request shares the
    # plain prefix cache.
    terms = tuple(term for term in steering.terms if np.float32(term.strength) != 0)
    return replace(steering, terms=terms) if terms else None


def _known(vectors: Mapping[str, VectorEntry], near: str = "") -> str:
    return f"known vectors: {listed(vectors, near)}"
