"""What is evaluated: one served model, without steering and with each of the chosen vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline.answer_forms import Form, Models, Tokenised, Version
from offline.endpoint import Endpoint, Refused
from offline.endpoint_scorer import UNSTEERED
from offline.errors import InputError

BASE = "base"
_SAMPLE = "Where was the record kept in 1987? 42% said: at home, in Zürich."


@dataclass(frozen=True)
class Setting:
    """One way to ask the server.

    Attributes:
        name: for the report.
        model: the served model's name or an alias.
        xargs: the request's `vllm_xargs`.
        border: the server must be told where a given answer begins (see `score_items`).
    """

    name: str
    model: str
    xargs: Mapping[str, Any] = field(default_factory=dict)
    border: bool = False


@dataclass(frozen=True)
class Target:
    """A server with its settings, the first of them the base, and the tokenizer of its model.

    Attributes:
        processor: of a model that takes images; None elsewhere.
    """

    endpoint: Endpoint
    settings: Sequence[Setting]
    tokenizer: Any
    tokenizer_source: str
    max_length: int
    facts: Mapping[str, Any]
    processor: Any = None


def connect(
    endpoint: Endpoint, model: str, steered: Sequence[str], tokenizer: str | None = None
) -> Target:
    """Asks the server what it serves.

    Args:
        model: the served name of the model itself.
        steered: model aliases, such as `NAME:truthful`.
        tokenizer: folder or hub id; by default what the server says its model is.

    Raises:
        InputError: a name is not served, or the tokenizer is missing or another one.
    """
    cards = {card.id: card for card in endpoint.get("/v1/models", Models).data}
    for option, name in (("--model", model), *(("--steered", alias) for alias in steered)):
        if name not in cards:
            raise InputError(
                f"{option} is '{name}', but {endpoint.name} serves {', '.join(sorted(cards))}"
            )
    length = cards[model].max_model_len
    if length is None:
        raise InputError(f"{endpoint.name} does not say its max_model_len, as vLLM does")
    source = tokenizer or cards[model].root or model
    loaded = _tokenizer(source)
    names = [alias.removeprefix(f"{model}:") for alias in steered]
    for number, name in enumerate(names):
        if name == BASE or name in names[:number]:
            raise InputError(f"--steered: two settings would be called '{name}'")
    border = [_needs_border(endpoint, alias, loaded) for alias in steered]
    facts = {
        "url": endpoint.name,
        "model": model,
        "steered": list(steered),
        "server": _version(endpoint),
        "tokenizer_checked": _require_same_tokenizer(endpoint, model, loaded, source),
    }
    settings = [
        Setting(BASE, model, UNSTEERED),
        *(
            Setting(name, alias, {}, needed)
            for name, alias, needed in zip(names, steered, border, strict=True)
        ),
    ]
    return Target(endpoint, settings, loaded, source, length, facts, _processor(source))


def _tokenizer(source: str) -> Any:
    import transformers

    if source.startswith(("/", ".")) and not Path(source).is_dir():
        raise InputError(f"the tokenizer '{source}' is not here; name one with --tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"the tokenizer '{source}' cannot be loaded ({error}); name one with --tokenizer"
        ) from error


def _processor(source: str) -> Any:
    """What knows the chat template of a model that takes images; None for other models."""
    import transformers

    from offline.model import takes_images

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError):  # a tokenizer alone
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(source) if takes_images(config) else None
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the processor of '{source}' cannot be loaded ({error})") from error


def _needs_border(endpoint: Endpoint, alias: str, tokenizer: Any) -> bool:
    """Whether the alias steers prompt and answer differently; where not, a border is refused."""
    body = {
        "model": alias,
        "prompt": tokenizer("a b", add_special_tokens=False)["input_ids"],
        "max_tokens": 1,
        "vllm_xargs": {"steering_prompt_tokens": 1},
    }
    try:
        endpoint.post("/v1/completions", body, Form, lambda _: None)
    except Refused as error:
        if error.status == 400 and "steering_positions 'all'" in error.reason:
            return False
        raise
    return True


def _require_same_tokenizer(endpoint: Endpoint, model: str, tokenizer: Any, source: str) -> bool:
    """Refuses another tokenizer than the server's; False where the server cannot be asked."""
    body = {"model": model, "prompt": _SAMPLE, "add_special_tokens": False}
    try:
        served = endpoint.post("/tokenize", body, Tokenised, lambda answer: answer.tokens)
    except Refused:
        return False
    ours = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if served != ours:
        name = Path(source).name
        raise InputError(
            f"the tokenizer '{name}' is not the one of the server's '{model}': it makes "
            f"{len(ours)} tokens of a sentence of which the server makes {len(served)}"
            if len(served) != len(ours)
            else f"the tokenizer '{name}' is not the one of the server's '{model}': same number "
            "of tokens, other ids"
        )
    return True


def _version(endpoint: Endpoint) -> str | None:
    try:
        return f"vllm {endpoint.get('/version', Version).version}"
    except InputError:
        return None


def writes_bos(tokenizer: Any) -> bool:
    """Whether texts begin with BOS for this tokenizer and do not end with EOS."""
    ids = tokenizer("a")["input_ids"]
    starts = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return starts and ids[-1] != tokenizer.eos_token_id
