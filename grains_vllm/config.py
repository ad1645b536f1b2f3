"""The catalogue of steering vectors: from YAML to a canonical form that every process shares."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grains_vllm.errors import GrainsConfigError
from grains_vllm.shift import FORMULA_VERSION
from grains_vllm.vectors import POSITIONS, ArtifactError, ModelFingerprint, SteeringVector

KEY = "grains"  # in VllmConfig.additional_config
SCALES = ("relative", "absolute")
OUTPUTS = ("sum", "single", "first")
# Far beyond any useful strength, and small enough that float32 norms cannot overflow.
MAX_STRENGTH = 1e6

_TOP_KEYS = ("vectors", "default", "layer_output")
_ENTRY_KEYS = ("path", "strength", "layers", "positions", "scale", "description")


@dataclass(frozen=True)
class VectorEntry:
    """One catalogue entry: a vector by name, and how it steers unless a request says otherwise.

    Attributes:
        digest: sha256 of the artifact's deciding bytes (SteeringVector.digest); the worker checks
            the file that it reads against it.
        layers: 0-based decoder layers that are steered, ascending.
        scale: "relative" makes strength a fraction of the usual ||h||, "absolute" a length.
        origin: the passport's model_id, to notice a vector of a sibling model.
    """

    name: str
    path: str
    digest: str
    strength: float
    layers: tuple[int, ...]
    positions: str = "all"
    scale: str = "relative"
    origin: str = ""

    @property
    def slot_key(self) -> str:
        """Identifies the bank row: entries that differ in strength or positions only share one."""
        return _sha256([FORMULA_VERSION, self.digest, self.layers, self.scale])


@dataclass(frozen=True)
class Steering:
    """What one request gets: a vector, a strength and positions.

    Attributes:
        prompt_tokens: how many tokens at the request's start count as prompt for `positions`; None
            for the request's own prompt. Who scores a given answer sends it as part of the prompt,
            and says with this where it begins.
    """

    entry: VectorEntry
    strength: float
    positions: str
    prompt_tokens: int | None = None

    @property
    def digest(self) -> str:
        """Equal only for requests whose KV cache is interchangeable, up to where prompts end."""
        return _sha256([self.entry.slot_key, float(np.float32(self.strength)), self.positions])


@dataclass(frozen=True)
class Catalogue:
    """Every vector that requests may name, the server's default, and the layer convention override.

    Attributes:
        model: the fingerprint that all vectors share.
        default: applied to requests that say nothing about steering.
        layer_output: how the model's layers return their residual stream, for a class that
            layers.py does not know; one of OUTPUTS.
    """

    vectors: Mapping[str, VectorEntry]
    model: ModelFingerprint
    default: Steering | None = None
    layer_output: str | None = None

    @property
    def layers(self) -> list[int]:
        """Every layer that some vector steers, ascending."""
        return sorted({layer for entry in self.vectors.values() for layer in entry.layers})

    def to_json(self) -> dict[str, Any]:
        """The canonical form for `additional_config`: JSON-able, the same for every order."""
        return {
            "resolved": [asdict(self.vectors[name]) for name in sorted(self.vectors)],
            "model": asdict(self.model),
            "layer_output": self.layer_output,
            "default": self.default
            and {
                "name": self.default.entry.name,
                "strength": self.default.strength,
                "positions": self.default.positions,
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Catalogue":
        """The inverse of `to_json`; touches no file."""
        entries = [
            VectorEntry(**{**item, "layers": tuple(item["layers"])}) for item in data["resolved"]
        ]
        vectors = {entry.name: entry for entry in entries}
        default = data["default"]
        return cls(
            vectors,
            ModelFingerprint(**data["model"]),
            default
            and Steering(vectors[default["name"]], default["strength"], default["positions"]),
            data["layer_output"],
        )


def catalogue_of(vllm_config: Any) -> Catalogue | None:
    """The catalogue that an engine was started with, or None for an engine without grains."""
    additional = vllm_config.additional_config
    data = additional.get(KEY) if isinstance(additional, dict) else None
    return None if data is None else Catalogue.from_json(data)


def read_catalogue(data: Any) -> Catalogue:
    """Builds the catalogue from `additional_config["grains"]`.

    Args:
        data: {"config": "steering.yaml"}, or the YAML's own keys inline (paths then are relative
            to the working directory).

    Raises:
        GrainsConfigError: naming the field, what was found and what is allowed.
    """
    where = "additional_config['grains']"
    if not isinstance(data, Mapping):
        raise GrainsConfigError(f"{where}: {data!r} is not a mapping")
    if "config" not in data:
        return _catalogue(data, where, Path.cwd())
    if len(data) > 1:
        extra = sorted(set(data) - {"config"})
        raise GrainsConfigError(f"{where}: 'config' names a file, so {extra} belong into that file")
    path = Path(str(data["config"]))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GrainsConfigError(f"--grains-config {path}: cannot be read ({error})") from error
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise GrainsConfigError(f"--grains-config {path}: not valid YAML ({error})") from error
    if not isinstance(content, Mapping):
        raise GrainsConfigError(f"{path}: expected a mapping with the key 'vectors'")
    return _catalogue(content, str(path), path.resolve().parent)


def _catalogue(data: Mapping[str, Any], where: str, folder: Path) -> Catalogue:
    _known_keys(data, _TOP_KEYS, where)
    items = data.get("vectors")
    if not isinstance(items, Mapping) or not items:
        raise GrainsConfigError(f"{where}: vectors must map at least one name to its settings")
    vectors, models = {}, {}
    for name, settings in items.items():
        entry, models[name] = _entry(name, settings, f"{where}: vectors.{name}", folder)
        vectors[name] = entry
    if len(set(models.values())) > 1:
        listed = "; ".join(f"{name}: {model}" for name, model in models.items())
        raise GrainsConfigError(f"{where}: the vectors were made for different models ({listed})")
    output = data.get("layer_output")
    if output is not None and output not in OUTPUTS:
        raise GrainsConfigError(f"{where}: layer_output is {output!r}, allowed: {_listed(OUTPUTS)}")
    catalogue = Catalogue(vectors, next(iter(models.values())), layer_output=output)
    return replace(catalogue, default=_default(data.get("default"), catalogue, where))


def _entry(
    name: Any, settings: Any, where: str, folder: Path
) -> tuple[VectorEntry, ModelFingerprint]:
    # "none" switches steering off in requests; "=" and "," separate names there; ":" is the alias.
    if not isinstance(name, str) or not name or name == "none" or set(name) & set("=,:/ \t\n"):
        raise GrainsConfigError(
            f"{where}: {name!r} cannot name a vector (text without space, '=', ',', ':' or '/', "
            "and not 'none')"
        )
    if not isinstance(settings, Mapping):
        raise GrainsConfigError(f"{where}: expected a mapping with the key 'path'")
    _known_keys(settings, _ENTRY_KEYS, where)
    path = settings.get("path")
    if not isinstance(path, str) or not path:
        raise GrainsConfigError(f"{where}.path: {path!r} is not a file name")
    try:
        vector = SteeringVector.load(folder / path)
    except ArtifactError as error:
        raise GrainsConfigError(f"{where}.path: {error}") from error
    # For the file's readers; no part of the entry, and so not of the compile-cache key.
    description = settings.get("description", "")
    if not isinstance(description, str):
        raise GrainsConfigError(f"{where}.description: {description!r} is not text")
    scale = one_of(settings.get("scale", "relative"), SCALES, f"{where}.scale")
    layers = _entry_layers(settings.get("layers"), vector, f"{where}.layers")
    unscaled = [layer for layer in layers if vector.reference_norms[layer] == 0]
    if scale == "relative" and unscaled:
        raise GrainsConfigError(
            f"{where}.layers: the artifact's reference norm is 0 at {unscaled}, so no "
            "strength would steer there; use other layers or scale: absolute"
        )
    entry = VectorEntry(
        name=name,
        path=str((folder / path).resolve()),
        digest=vector.digest,
        strength=_entry_strength(settings.get("strength"), vector, f"{where}.strength"),
        layers=layers,
        positions=one_of(
            settings.get("positions", vector.recommended_positions),
            POSITIONS,
            f"{where}.positions",
        ),
        scale=scale,
        origin=str(vector.passport.get("model_id", "")),
    )
    return entry, vector.model


def _entry_strength(value: Any, vector: SteeringVector, where: str) -> float:
    if value is None:
        value = vector.recommended_strength
    if value is None:
        raise GrainsConfigError(f"{where}: missing, and the artifact recommends none")
    return strength(value, where)


def _entry_layers(value: Any, vector: SteeringVector, where: str) -> tuple[int, ...]:
    if value is None:
        return tuple(sorted(vector.recommended_layers))
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not layers or any(type(n) is not int for n in layers):
        raise GrainsConfigError(f"{where}: {value!r} is not a layer number or a list of them")
    if missing := sorted(set(layers) - set(vector.layers)):
        raise GrainsConfigError(
            f"{where}: {missing} have no direction in the artifact, which has {vector.layers}"
        )
    return tuple(sorted(set(layers)))


def _default(value: Any, catalogue: Catalogue, where: str) -> Steering | None:
    if value is None or value == "none":
        return None
    from grains_vllm.selection import SelectionError, parse_steering

    try:
        return parse_steering(value, catalogue)
    except SelectionError as error:
        raise GrainsConfigError(f"{where}: default: {error}") from error


def strength(value: Any, where: str, error: type[ValueError] = GrainsConfigError) -> float:
    """Checks a strength: a finite number (no bool) of at most MAX_STRENGTH in size."""
    # Written so that NaN fails too, and so that no integer is too long to compare.
    if type(value) not in (int, float) or not abs(value) <= MAX_STRENGTH:
        limits = f"-{MAX_STRENGTH:g} and {MAX_STRENGTH:g}"
        raise error(f"{where}: {short(value)} is not a number between {limits}")
    return float(value)


def one_of(
    value: Any, allowed: tuple[str, ...], where: str, error: type[ValueError] = GrainsConfigError
) -> str:
    """Checks a choice and names the alternatives if it is none of them."""
    if value not in allowed:
        raise error(f"{where}: {short(value)} is not one of {_listed(allowed)}")
    return str(value)


def short(value: Any) -> str:
    """repr() for messages: somebody else's value, at a length that fits into one."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**80 else "a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggestion(found: str, known: tuple[str, ...] | list[str], cutoff: float = 0.75) -> str:
    """' (did you mean X?)' where one of the known names is close."""
    close = difflib.get_close_matches(found[:80], known, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _known_keys(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            raise GrainsConfigError(
                f"{where}: unknown key {key!r}{suggestion(str(key), known)}; "
                f"known keys: {_listed(known)}"
            )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML keeps the last of two equal keys; a vector that vanishes so is a silent error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"  # `<<: *base`, which may be overridden
        ]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
