"""The artifact: one safetensors file that holds one unit direction per decoder layer.

Format version 1 (docs/artifact.md has the same in prose, for those who write one):

- tensor `directions` [layers, hidden] float32: unit rows; an all-zero row has no direction.
- tensor `reference_norms` [layers] float32: median ||h|| after each block, where h was read.
- metadata `grains`: a JSON object, the passport; `format_version`, `layer_convention` and `model`
  are required in it, everything else describes where the vector came from.
"""

import dataclasses
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from grains_vllm import checks
from grains_vllm.checks import short

FORMAT_VERSION = 1
LAYER_CONVENTION = "residual stream after block l, 0-based"
_TENSORS = ("directions", "reference_norms")
# Far more than any artifact has, and no more than a process can hold besides.
MAX_BYTES = 2**30
_UNIT_TOLERANCE = 1e-3
# Far beyond any activation; keeps squares of the shifted stream within float32.
_MAX_NORM = 1e8


class ArtifactError(ValueError):
    """An artifact that cannot be used; the message names the field, the finding, the allowed."""


@dataclass(frozen=True)
class ModelFingerprint:
    """What a vector must have in common with the model it steers."""

    architecture: str
    hidden_size: int
    num_layers: int

    @classmethod
    def of(cls, hf_config: Any) -> "ModelFingerprint":
        """Reads the fingerprint off a transformers config (the text part of a multimodal one)."""
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        architectures = getattr(hf_config, "architectures", None) or ["unknown"]
        return cls(architectures[0], int(text.hidden_size), int(text.num_hidden_layers))

    def require(self, model: "ModelFingerprint", source: str) -> None:
        """Raises ArtifactError, naming both values, unless this vector fits `model`."""
        for name in ("architecture", "hidden_size", "num_layers"):
            mine, theirs = getattr(self, name), getattr(model, name)
            if mine != theirs:
                raise ArtifactError(
                    f"{source}: made for a model with {name} {mine!r}, "
                    f"but this model has {name} {theirs!r}"
                )


@dataclass(frozen=True)
class SteeringVector:
    """One direction per decoder layer, with the norms that give strengths their meaning.

    Attributes:
        directions: [layers, hidden] float32; rows are unit vectors or all zero (no direction).
        reference_norms: [layers] float32, >= 0; a strength of 1 shifts layer l by this length.
        model: the model family that it was made for.
        passport: JSON-able facts about its origin: method, data, scores, recommendation.
    """

    directions: torch.Tensor
    reference_norms: torch.Tensor
    model: ModelFingerprint
    passport: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_tensors(self.directions, self.reference_norms, self.model, "vector")

    @property
    def num_layers(self) -> int:
        return self.directions.shape[0]

    @property
    def layers(self) -> list[int]:
        """The layers that hold a direction, ascending."""
        return self.directions.abs().sum(dim=1).nonzero().flatten().tolist()

    @property
    def recommended_layers(self) -> list[int]:
        """The passport's `recommended.layers`, else every layer with a direction."""
        return list(self.passport.get("recommended", {}).get("layers") or self.layers)

    @property
    def recommended_strength(self) -> float | None:
        """The passport's `recommended.strength`, a fraction of the usual ||h||, if it has one."""
        value = self.passport.get("recommended", {}).get("strength")
        return None if value is None else float(value)

    @property
    def recommended_positions(self) -> str:
        """The passport's `recommended.positions`, else "all"."""
        return str(self.passport.get("recommended", {}).get("positions") or "all")

    @property
    def digest(self) -> str:
        """sha256 (hex) over what decides the outcome of steering; the passport's prose is not."""
        hasher = hashlib.sha256()
        facts = [FORMAT_VERSION, LAYER_CONVENTION, dataclasses.asdict(self.model)]
        hasher.update(json.dumps(facts, sort_keys=True).encode())
        for tensor in (self.directions, self.reference_norms):
            hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the artifact aside and renames it, so that `path` is never half a file."""
        passport = {
            **self.passport,
            "format_version": FORMAT_VERSION,
            "layer_convention": LAYER_CONVENTION,
            "model": dataclasses.asdict(self.model),
        }
        payload = safetensors.torch.save(
            {
                "directions": self.directions.contiguous(),
                "reference_norms": self.reference_norms.contiguous(),
            },
            metadata={"grains": json.dumps(passport, sort_keys=True, allow_nan=False)},
        )
        write_aside(path, payload)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: ModelFingerprint | None = None
    ) -> "SteeringVector":
        """Reads and validates an artifact.

        Args:
            path: a safetensors file of format version 1.
            model: if given, the model it is to steer.

        Raises:
            ArtifactError: the file is missing, damaged, of another format, or made for another
                model; the message names the file, the field and both values.
        """
        source = os.fspath(path)
        try:
            payload = read_whole(source, MAX_BYTES)
        except FileNotFoundError as error:
            raise ArtifactError(f"{source}: no such file") from error
        except OSError as error:
            raise ArtifactError(f"{source}: cannot be read ({error})") from error
        return cls.parse(payload, source, model)

    @classmethod
    def parse(
        cls, payload: bytes, source: str, model: ModelFingerprint | None = None
    ) -> "SteeringVector":
        """Validates the content of an artifact that messages call `source`; else as `load`."""
        tensors, passport = _parse(payload, source)
        fingerprint = _fingerprint(passport, source)
        _check_tensors(tensors["directions"], tensors["reference_norms"], fingerprint, source)
        if model is not None:
            fingerprint.require(model, source)
        vector = cls(tensors["directions"], tensors["reference_norms"], fingerprint, passport)
        _check_passport(vector, source)
        return vector


def read_whole(
    path: str | os.PathLike[str], most: int, dir_fd: int | None = None, follow: bool = True
) -> bytes:
    """What a plain file holds, as a private copy: whoever writes to the file meanwhile changes it
    for others only. (A mapped file that somebody truncates kills the process that reads on.)

    Args:
        most: bytes; more are refused before they are read.
        dir_fd: of the folder that `path` is relative to.
        follow: whether the file may be a symbolic link.

    Raises:
        OSError: it cannot be read, or is not such a file.
    """
    # NONBLOCK: opening a pipe would wait for somebody to write.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags, dir_fd=dir_fd)
    except ValueError as error:  # A NUL, or what the file system's encoding lacks.
        raise OSError(str(error)) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a plain file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, {most} are allowed")
        with open(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)


def tensors_of(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, given its content.

    Raises:
        ValueError: it is not one, or says something twice.
    """
    try:
        tensors = safetensors.torch.load(payload)
    except (safetensors.SafetensorError, LookupError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    size = int.from_bytes(payload[:8], "little")  # of the JSON header, which comes next
    header = json.loads(payload[8 : 8 + size], object_pairs_hook=_unique)
    return tensors, header.get("__metadata__") or {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def write_aside(path: str | os.PathLike[str], payload: bytes) -> None:
    """Writes `payload` to a temporary neighbour of `path`, then renames it into place."""
    target = Path(path)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _parse(payload: bytes, source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        tensors, metadata = tensors_of(payload)
    except ValueError as error:
        raise ArtifactError(f"{source}: cannot be read as a safetensors file ({error})") from error
    if "grains" not in metadata:
        raise ArtifactError(
            f"{source}: not a grains artifact (no 'grains' key in its safetensors metadata)"
        )
    if sorted(tensors) != sorted(_TENSORS):
        raise ArtifactError(
            f"{source}: holds the tensors {short(sorted(tensors))}, format version "
            f"{FORMAT_VERSION} holds exactly {sorted(_TENSORS)}"
        )
    try:
        passport = json.loads(
            metadata["grains"], parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: metadata 'grains' is not JSON ({error})") from error
    if not isinstance(passport, dict):
        raise ArtifactError(f"{source}: metadata 'grains' is not a JSON object")
    for name, value in passport.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON can say it, but nobody can be told it.
            raise ArtifactError(
                f"{source}: {short(name)} holds half a character (a lone surrogate)"
            ) from error
    return tensors, passport


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _fingerprint(passport: dict[str, Any], source: str) -> ModelFingerprint:
    version = passport.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{source}: format_version is {short(version)}, this release reads {FORMAT_VERSION}"
        )
    convention = passport.get("layer_convention")
    if convention != LAYER_CONVENTION:
        raise ArtifactError(
            f"{source}: layer_convention is {short(convention)}, expected {LAYER_CONVENTION!r}"
        )
    model = passport.get("model")
    kinds = {"architecture": str, "hidden_size": int, "num_layers": int}
    if not isinstance(model, dict) or set(model) != set(kinds):
        raise ArtifactError(
            f"{source}: metadata model is {short(model)}, expected an object with {sorted(kinds)}"
        )
    for name, kind in kinds.items():
        if type(model[name]) is not kind:
            raise ArtifactError(
                f"{source}: metadata model.{name} is {short(model[name])}, expected {kind.__name__}"
            )
    return ModelFingerprint(**model)


def _check_tensors(
    directions: torch.Tensor, norms: torch.Tensor, model: ModelFingerprint, source: str
) -> None:
    shapes = {
        "directions": (directions, (model.num_layers, model.hidden_size)),
        "reference_norms": (norms, (model.num_layers,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.dtype != torch.float32:
            raise ArtifactError(
                f"{source}: {name} has dtype {tensor.dtype}, expected torch.float32"
            )
        if tuple(tensor.shape) != shape:
            raise ArtifactError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, expected {shape} for this model"
            )
        if not torch.isfinite(tensor).all():
            where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise ArtifactError(f"{source}: {name} holds a NaN or infinity at {where}")
    lengths = directions.norm(dim=1)
    bad = ((lengths - 1).abs() > _UNIT_TOLERANCE) & (lengths != 0)
    if bad.any():
        layer = int(bad.nonzero()[0])
        raise ArtifactError(
            f"{source}: the direction of layer {layer} has norm {lengths[layer]:.6g}, expected 1 "
            "(or 0 for a layer without a direction)"
        )
    if not lengths.any():
        raise ArtifactError(f"{source}: every direction is zero, there is nothing to steer with")
    bad = (norms < 0) | (norms > _MAX_NORM)
    if bad.any():
        layer = int(bad.nonzero()[0])
        raise ArtifactError(
            f"{source}: the reference norm of layer {layer} is {norms[layer]:.6g}, "
            f"expected 0 to {_MAX_NORM:g}"
        )


def _check_passport(vector: SteeringVector, source: str) -> None:
    """Raises ArtifactError for what this package reads of the passport, if it is not what it must
    be."""
    checks.text(vector.passport.get("model_id", ""), f"{source}: model_id", ArtifactError)
    recommended = vector.passport.get("recommended", {})
    if not isinstance(recommended, dict):
        raise ArtifactError(f"{source}: recommended is {short(recommended)}, expected an object")
    layers, strength = recommended.get("layers"), recommended.get("strength")
    positions = recommended.get("positions")
    if positions is not None:
        checks.positions(positions, f"{source}: recommended.positions", ArtifactError)
    if strength is not None:
        checks.strength(strength, f"{source}: recommended.strength", ArtifactError)
    if layers is None:
        return
    if not isinstance(layers, list) or not layers or any(type(n) is not int for n in layers):
        raise ArtifactError(
            f"{source}: recommended.layers is {short(layers)}, expected a list of ints"
        )
    if len(set(layers)) < len(layers):
        raise ArtifactError(f"{source}: recommended.layers is {short(layers)}: one stands twice")
    if not set(layers) <= set(vector.layers):
        raise ArtifactError(
            f"{source}: recommended.layers is {short(layers)}, but directions exist for "
            f"{vector.layers}"
        )
