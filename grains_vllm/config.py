"""From YAML to a Catalogue: every value checked, every artifact read once."""

import os
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grains_vllm import plain_yaml
from grains_vllm.catalogue import Admin, Canary, Catalogue, Limits, Steering, VectorEntry
from grains_vllm.checks import integer, known_keys, one_of, positions, short, strength, text
from grains_vllm.errors import GrainsConfigError
from grains_vllm.vectors import (
    MAX_BYTES,
    ArtifactError,
    ModelFingerprint,
    SteeringVector,
    read_whole,
)

SCALES = ("relative", "absolute")
OUTPUTS = ("sum", "single", "first")
MOST_SLOTS = 4096
MOST_VECTORS_PER_REQUEST = 8
# What a server that may get more vectors while it serves keeps free for them.
SPARE_SLOTS = 4

_TOP_KEYS = (
    "vectors",
    "default",
    "canary",
    "slots",
    "max_vectors_per_request",
    "steered_layers",
    "admin",
    "layer_output",
)
_ENTRY_KEYS = ("path", "strength", "layers", "positions", "scale", "description")
_ADMIN_KEYS = ("folder", "max_vectors", "max_bytes")
_CANARY_KEYS = ("name", "fraction")


@dataclass(frozen=True)
class _Source:
    """Where settings stand: their name in messages, the folder of their paths, the YAML if any."""

    where: str
    folder: Path
    file: str = ""


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
        raise GrainsConfigError(f"{where}: {short(data)} is not a mapping")
    if "config" not in data:
        return _catalogue(data, _Source(where, Path.cwd()))
    if len(data) > 1:
        extra = short([key for key in data if key != "config"])
        raise GrainsConfigError(f"{where}: 'config' names a file, so {extra} belong into that file")
    given = data["config"]
    path = text(os.fspath(given) if isinstance(given, Path) else given, "--grains-config")
    try:
        content = plain_yaml.load(read_whole(path, plain_yaml.MAX_BYTES))
    except OSError as error:
        raise GrainsConfigError(f"--grains-config {path}: cannot be read ({error})") from error
    except plain_yaml.PlainYAMLError as error:
        raise GrainsConfigError(f"--grains-config {path}: not valid YAML ({error})") from error
    if not isinstance(content, Mapping):
        raise GrainsConfigError(f"{path}: expected a mapping with the key 'vectors'")
    resolved = Path(text(os.path.realpath(path), "--grains-config"))
    return _catalogue(content, _Source(path, resolved.parent, str(resolved)))


def read_entry(
    name: Any,
    settings: Any,
    folder: Path,
    where: str,
    load: Callable[[Path], SteeringVector] = SteeringVector.load,
) -> tuple[VectorEntry, ModelFingerprint]:
    """Reads one vector's settings and its artifact.

    Args:
        settings: the keys of a vector in the YAML.
        folder: what `path` is relative to, absolute.
        where: how messages call these settings.
        load: reads the artifact; may raise ArtifactError.

    Raises:
        GrainsConfigError: naming the field, what was found and what is allowed.
    """
    # "none" switches steering off in requests; "=" and "," separate names there; ":" is the alias.
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= 128
        or name == "none"
        or not name.isprintable()
        or not name.strip(".")  # "." and ".." are no path of a URL
        or unicodedata.normalize("NFC", name) != name  # two names that look the same
        or set(name) & set("=,:/ ")
    ):
        raise GrainsConfigError(
            f"{where}: {short(name)} cannot name a vector (text of 1 to 128 printable characters "
            "in Unicode's form NFC, without space, '=', ',', ':' or '/', not 'none' and not dots)"
        )
    if not isinstance(settings, Mapping):
        raise GrainsConfigError(f"{where}: expected a mapping with the key 'path'")
    known_keys(settings, _ENTRY_KEYS, where)
    path = _file_name(settings.get("path"), f"{where}.path", "file")
    try:
        vector = load(folder / path)
    except ArtifactError as error:
        raise GrainsConfigError(f"{where}.path: {error}") from error
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
        path=str(folder / path),
        digest=vector.digest,
        strength=_entry_strength(settings.get("strength"), vector, f"{where}.strength"),
        layers=layers,
        positions=positions(
            settings.get("positions", vector.recommended_positions), f"{where}.positions"
        ),
        scale=scale,
        origin=vector.passport.get("model_id", ""),
        description=text(settings.get("description", ""), f"{where}.description"),
    )
    return entry, vector.model


def _catalogue(data: Mapping[str, Any], source: _Source) -> Catalogue:
    where = source.where
    known_keys(data, _TOP_KEYS, where)
    items = data.get("vectors")
    if not isinstance(items, Mapping) or not items:
        raise GrainsConfigError(f"{where}: vectors must map at least one name to its settings")
    vectors, models = {}, {}
    for name, settings in items.items():
        vectors[name], models[name] = read_entry(
            name, settings, source.folder, f"{where}: vectors.{short(name).strip(chr(39))}"
        )
    if len(set(models.values())) > 1:
        listed = "; ".join(f"{name}: {model}" for name, model in models.items())
        raise GrainsConfigError(f"{where}: the vectors were made for different models ({listed})")
    model = next(iter(models.values()))
    output = data.get("layer_output")
    if output is not None:
        one_of(output, OUTPUTS, f"{where}: layer_output")
    admin = _admin(data.get("admin"), source)
    if admin is not None and len(vectors) > admin.max_vectors:
        raise GrainsConfigError(
            f"{where}: admin.max_vectors is {admin.max_vectors}, but there are {len(vectors)}"
        )
    limits = _limits(data, vectors, model, admin, where)
    default = _steering(data.get("default"), vectors, limits, f"{where}: default")
    canary = _canary(data.get("canary"), vectors, limits, f"{where}: canary")
    return Catalogue(vectors, model, limits, default, canary, admin, output)


def _limits(
    data: Mapping[str, Any],
    vectors: Mapping[str, VectorEntry],
    model: ModelFingerprint,
    admin: Admin | None,
    where: str,
) -> Limits:
    used = {layer for entry in vectors.values() for layer in entry.layers}
    layers = data.get("steered_layers")
    if layers is None:
        chosen = used
    elif layers == "all":
        chosen = set(range(model.num_layers))
    else:
        chosen = set(_layer_list(layers, f"{where}: steered_layers"))
        if outside := sorted(n for n in chosen if not 0 <= n < model.num_layers):
            raise GrainsConfigError(
                f"{where}: steered_layers: {short(outside)} are no layers of a model with "
                f"{model.num_layers}"
            )
    if missing := sorted(used - chosen):
        raise GrainsConfigError(
            f"{where}: steered_layers leaves out {missing}, which the vectors steer"
        )
    most = integer(
        data.get("max_vectors_per_request", 2),
        1,
        MOST_VECTORS_PER_REQUEST,
        f"{where}: max_vectors_per_request",
    )
    distinct = len({(entry.digest, entry.layers, entry.scale) for entry in vectors.values()})
    spare = 0 if admin is None else min(SPARE_SLOTS, max(0, admin.max_vectors - len(vectors)))
    slots = integer(
        data.get("slots", max(distinct + spare, most)), 1, MOST_SLOTS, f"{where}: slots"
    )
    if slots < most:
        raise GrainsConfigError(
            f"{where}: slots is {slots}, but one request may combine {most} vectors "
            "(max_vectors_per_request)"
        )
    return Limits(tuple(sorted(chosen)), slots, most)


def _admin(value: Any, source: _Source) -> Admin | None:
    if value is None:
        return None
    where = f"{source.where}: admin"
    if not isinstance(value, Mapping):
        raise GrainsConfigError(f"{where}: expected a mapping with the key 'folder'")
    known_keys(value, _ADMIN_KEYS, where)
    name = _file_name(value.get("folder"), f"{where}.folder", "folder")
    folder = text(os.path.realpath(source.folder / name), f"{where}.folder")
    if not os.path.isdir(folder):
        raise GrainsConfigError(f"{where}.folder: {short(name)} is not a folder")
    return Admin(
        folder,
        integer(value.get("max_vectors", 64), 1, 100_000, f"{where}.max_vectors"),
        integer(value.get("max_bytes", 2**28), 1, MAX_BYTES, f"{where}.max_bytes"),
        source.file,
    )


def _canary(
    value: Any, vectors: Mapping[str, VectorEntry], limits: Limits, where: str
) -> Canary | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise GrainsConfigError(f"{where}: expected a mapping with the keys 'name' and 'fraction'")
    known_keys(value, _CANARY_KEYS, where)
    steering = _steering(value.get("name"), vectors, limits, f"{where}.name")
    if steering is None:
        raise GrainsConfigError(f"{where}.name: names no vector")
    fraction: Any = value.get("fraction")
    if type(fraction) not in (int, float) or not 0 <= fraction <= 1:
        raise GrainsConfigError(f"{where}.fraction: {short(fraction)} is not a number from 0 to 1")
    return Canary(steering, float(fraction))


def _steering(
    value: Any, vectors: Mapping[str, VectorEntry], limits: Limits, where: str
) -> Steering | None:
    if value is None or value == "none":
        return None
    from grains_vllm.selection import SelectionError, parse_steering

    try:
        return Steering.of(parse_steering(value, vectors, limits))
    except SelectionError as error:
        raise GrainsConfigError(f"{where}: {error}") from error


def _entry_strength(value: Any, vector: SteeringVector, where: str) -> float:
    if value is None:
        value = vector.recommended_strength
    if value is None:
        raise GrainsConfigError(f"{where}: missing, and the artifact recommends none")
    return strength(value, where)


def _entry_layers(value: Any, vector: SteeringVector, where: str) -> tuple[int, ...]:
    if value is None:
        return tuple(sorted(vector.recommended_layers))
    layers = _layer_list(value, where)
    if missing := sorted(set(layers) - set(vector.layers)):
        raise GrainsConfigError(
            f"{where}: {short(missing)} have no direction in the artifact, which has "
            f"{vector.layers}"
        )
    return tuple(sorted(set(layers)))


def _file_name(value: Any, where: str, kind: str) -> str:
    if not isinstance(value, str) or not value:
        raise GrainsConfigError(f"{where}: {short(value)} is not the name of a {kind}")
    return text(value, where)


def _layer_list(value: Any, where: str) -> list[int]:
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not layers or any(type(n) is not int for n in layers):
        raise GrainsConfigError(f"{where}: {short(value)} is not a layer number or a list of them")
    return layers
