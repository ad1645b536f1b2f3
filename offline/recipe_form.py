"""What a recipe's YAML must hold, and messages that say where one does not."""

import hashlib
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jinja2.sandbox
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from grains_vllm import plain_yaml
from offline.errors import InputError
from offline.options import ExtractOptions

PLACE = "{text}"
TEMPLATES = ("id", "prompt", "chosen", "rejected")
# The sandbox: a recipe may come from a stranger, and must not run code.
JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
_Model = TypeVar("_Model", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(_Part):
    """Where rows come from: a hub data set, or one of the public `files`, given with --data.

    Attributes:
        every: of the hub's rows, one in so many is read, evenly, for sets that are larger than what
            is needed of them.
    """

    hub: str
    config: str | None = None
    split: str
    every: Annotated[int, Field(ge=1)] = 1
    files: list[str] = []


class Form(_Part):
    """How a row with these columns becomes a pair: Jinja templates over its columns.

    Attributes:
        columns: a row that has all of them has this form; none of them may be empty.
        keep: an expression; rows for which it is false make no pair.
    """

    columns: Annotated[list[str], Field(min_length=1)]
    keep: str | None = None
    id: str | None = None
    prompt: str
    chosen: str
    rejected: str

    @pydantic.field_validator("keep", *TEMPLATES)
    @classmethod
    def _is_jinja(cls, value: str | None, info: pydantic.ValidationInfo) -> str | None:
        if value is None:
            return None
        check = JINJA.compile_expression if info.field_name == "keep" else JINJA.parse
        try:
            check(value)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"not valid Jinja ({error})") from error
        return value


class Raw(_Part):
    """What stands around prompt and responses in format raw; it is never masked."""

    prompt: str
    response: str

    @pydantic.field_validator("prompt", "response")
    @classmethod
    def _holds_the_text_once(cls, value: str) -> str:
        if value.count(PLACE) != 1:
            raise ValueError(f"expected {PLACE} in it exactly once")
        return value


class Splits(_Part):
    """How many pairs calibrate, choose and judge; no prompt is in two of them."""

    calibration: Annotated[int, Field(ge=2)]
    validation: Annotated[int, Field(ge=1)]
    test: Any
    seed: Annotated[int, Field(ge=0)]

    @pydantic.field_validator("test")
    @classmethod
    def _counts_or_takes_the_rest(cls, value: Any) -> Any:
        if value != "rest" and not (type(value) is int and value >= 1):
            raise ValueError("expected a whole number from 1, or rest")
        return value


class Sweep(_Part):
    """What to try afterwards, as `grains sweep` spells it."""

    layers: str
    strengths: str
    metric: str
    min_controls: float | None = None
    max_perplexity_increase: float | None = None


class Recipe(_Part):
    """One data set.

    Attributes:
        images: the column that holds an image for every prompt, if there is one.
        pairs: the forms in which rows come; none where the data only evaluates.
        options: fields of ExtractOptions.
        evaluate: tasks of `grains evaluate`; `pairs` is the split `test`.
    """

    title: str
    paper: str
    licence: str
    notes: list[str]
    data: Data
    images: str | None = None
    pairs: list[Form]
    format: Literal["chat", "raw"]
    raw: Raw
    splits: Splits | None = None
    options: dict[str, Any] = {}
    sweep: Sweep | None = None
    evaluate: list[str]
    _name: str = ""
    _sha256: str = ""

    @pydantic.model_validator(mode="after")
    def _splits_its_pairs(self) -> "Recipe":
        if bool(self.pairs) != bool(self.splits):
            raise ValueError("'pairs' and 'splits' belong together: give both, or neither")
        return self

    @pydantic.model_validator(mode="after")
    def _has_its_images(self) -> "Recipe":
        if self.images is None:
            return self
        if self.format != "chat":
            raise ValueError("'images' needs the format chat: an image stands in a message")
        if any(self.images not in form.columns for form in self.pairs):
            raise ValueError(f"'images' is '{self.images}', which is no column of every form")
        return self

    @property
    def name(self) -> str:
        """The file's name, without its ending."""
        return self._name

    @property
    def sha256(self) -> str:
        """Of the file."""
        return self._sha256


# `chat` and `limit` are said by `format` and `splits.calibration`.
_Options: type[BaseModel] = pydantic.create_model(
    "Options",
    __base__=_Part,
    **{
        name: (hint, None)
        for name, hint in typing.get_type_hints(ExtractOptions).items()
        if name not in ("chat", "limit")
    },
)  # type: ignore[call-overload]


def read_recipe(path: Path) -> Recipe:
    """Reads and validates one YAML file.

    Raises:
        InputError: naming the file, the key, what was found and what is allowed.
    """
    payload = path.read_bytes()
    try:
        content = plain_yaml.load(payload)
    except plain_yaml.PlainYAMLError as error:
        raise InputError(f"{path.name}: not readable as YAML ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name}: expected a mapping with {', '.join(Recipe.model_fields)}")
    recipe = _validated(Recipe, content, path.name, "")
    given = _validated(_Options, recipe.options, path.name, "options.")
    options = {name: getattr(given, name) for name in recipe.options}
    try:
        ExtractOptions(**options).require_meaning(options)
    except InputError as error:
        raise InputError(f"{path.name}: options: {error}") from error
    recipe = recipe.model_copy(update={"options": options})
    recipe._name, recipe._sha256 = path.stem, hashlib.sha256(payload).hexdigest()
    return recipe


def _validated(kind: type[_Model], content: dict[Any, Any], file: str, prefix: str) -> _Model:
    try:
        # Through JSON, because only there a strict check takes names for members of an enum.
        return kind.model_validate_json(json.dumps(content, default=str))
    except pydantic.ValidationError as error:
        problems = [_problem(kind, found, prefix) for found in error.errors()]
        raise InputError(f"{file}: {'; '.join(problems)}") from error


def _problem(kind: type[BaseModel], found: Any, prefix: str) -> str:
    place = prefix + ".".join(str(part) for part in found["loc"])
    if found["type"] == "missing":
        return f"'{place}' is missing"
    if found["type"] == "extra_forbidden":
        return f"'{place}' is no key here, expected one of {', '.join(_keys(kind, found['loc']))}"
    message = found["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not found["loc"]:
        return message
    shown = json.dumps(found["input"], default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"'{place}' is {shown}: {message if message != found['msg'] else message.lower()}"


def _keys(kind: Any, place: Sequence[int | str]) -> list[str]:
    """The keys that are allowed beside the one at `place`."""
    for part in place[:-1]:
        if isinstance(part, str):
            hint = kind.model_fields[part].annotation
            inner = [hint, *typing.get_args(hint)]
            kind = next(one for one in inner if isinstance(one, type) and issubclass(one, _Part))
    return list(kind.model_fields)
