"""The catalogue: every vector that requests may name, in a form that all processes share."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from grains_vllm.shift import FORMULA_VERSION
from grains_vllm.vectors import ModelFingerprint

KEY = "grains"  # in VllmConfig.additional_config


@dataclass(frozen=True)
class VectorEntry:
    """One catalogue entry: a vector by name, and how it steers unless a request says otherwise.

    Attributes:
        digest: sha256 of the artifact's deciding bytes (SteeringVector.digest); the worker checks
            the file that it reads against it.
        layers: 0-based decoder layers that are steered, ascending.
        positions: canonical text of a Positions.
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
    description: str = ""


@dataclass(frozen=True)
class Term:
    """One vector's part in a request's steering.

    Attributes:
        layers: what the request left of the entry's layers.
    """

    entry: VectorEntry
    strength: float
    positions: str
    layers: tuple[int, ...]

    @property
    def slot_key(self) -> str:
        """Identifies the bank row: strength, its sign and positions cost none."""
        return _sha256([FORMULA_VERSION, self.entry.digest, self.layers, self.entry.scale])


@dataclass(frozen=True)
class Steering:
    """What one request gets: the sum of its terms, renormalised once.

    Attributes:
        terms: in a canonical order, so that `a,b` and `b,a` are one steering.
        prompt_tokens: how many tokens at the request's start count as prompt for positions; None
            for the request's own prompt. Who scores a given answer sends it as part of the prompt,
            and says with this where it begins.
    """

    terms: tuple[Term, ...]
    prompt_tokens: int | None = None

    @classmethod
    def of(cls, terms: Iterable[Term], prompt_tokens: int | None = None) -> "Steering":
        return cls(tuple(sorted(terms, key=_canonical)), prompt_tokens)

    @property
    def digest(self) -> str:
        """Identifies vectors, layers, strengths and positions, whatever order they came in."""
        return _sha256([FORMULA_VERSION, *map(_canonical, self.terms)])

    def __str__(self) -> str:
        return ",".join(f"{term.entry.name}={term.strength:g}" for term in self.terms)


def _canonical(term: Term) -> tuple[str, float, str]:
    # float32 is what the layers compute with; positions come last and are canonical text.
    return term.slot_key, float(np.float32(term.strength)), term.positions


@dataclass(frozen=True)
class Canary:
    """A steering for a share of the requests that say nothing about steering.

    Attributes:
        fraction: 0 to 1, of users, keys or request ids; the same one always gets the same side.
    """

    steering: Steering
    fraction: float

    def takes(self, identity: str) -> bool:
        """Whether this user, key or request id is among the steered ones."""
        names = sorted(term.entry.name for term in self.steering.terms)
        dice = hashlib.sha256(json.dumps([names, identity]).encode()).digest()
        return int.from_bytes(dice[:8], "big") < self.fraction * 2**64


@dataclass(frozen=True)
class Limits:
    """What is decided once, at start, since it is compiled in.

    Attributes:
        layers: 0-based decoder layers that can be steered, ascending.
        slots: vectors on the device at one time.
        max_vectors_per_request: how many one request may combine.
    """

    layers: tuple[int, ...]
    slots: int
    max_vectors_per_request: int


@dataclass(frozen=True)
class Admin:
    """What the routes that change the catalogue may do.

    Attributes:
        folder: the one directory, absolute, from which vectors are added.
        max_vectors: entries that the catalogue may have.
        max_bytes: size of an artifact.
        source: the YAML file that `reload` reads again.
    """

    folder: str
    max_vectors: int
    max_bytes: int
    source: str


@dataclass(frozen=True)
class Catalogue:
    """Every vector that requests may name, and what the server does by itself.

    Attributes:
        model: the fingerprint that all vectors share.
        default: applied to requests that say nothing about steering.
        canary: tried on a share of these before `default`.
        admin: None where the catalogue cannot be changed while serving.
        layer_output: how the model's layers return their residual stream, for a class that
            layers.py does not know; one of config.OUTPUTS.
    """

    vectors: Mapping[str, VectorEntry]
    model: ModelFingerprint
    limits: Limits
    default: Steering | None = None
    canary: Canary | None = None
    admin: Admin | None = None
    layer_output: str | None = None

    @property
    def unchecked(self) -> bool:
        """Whether how layers return their stream is somebody's word.

        Said of a known class too where the YAML has `layer_output` although it need not: in the
        front end nobody knows the layers' classes, and a doubt too many does no harm.
        """
        return self.layer_output is not None

    def to_json(self) -> dict[str, Any]:
        """The canonical form for `additional_config`: JSON-able, the same for every order."""
        return {
            "resolved": [asdict(self.vectors[name]) for name in sorted(self.vectors)],
            "model": asdict(self.model),
            "limits": asdict(self.limits),
            "default": self.default and _terms_to_json(self.default),
            "canary": self.canary
            and {
                "terms": _terms_to_json(self.canary.steering),
                "fraction": self.canary.fraction,
            },
            "admin": self.admin and asdict(self.admin),
            "layer_output": self.layer_output,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Catalogue":
        """The inverse of `to_json`; touches no file."""
        entries = [
            VectorEntry(**{**item, "layers": tuple(item["layers"])}) for item in data["resolved"]
        ]
        vectors = {entry.name: entry for entry in entries}
        limits, canary = data["limits"], data["canary"]
        return cls(
            vectors=vectors,
            model=ModelFingerprint(**data["model"]),
            limits=Limits(**{**limits, "layers": tuple(limits["layers"])}),
            default=data["default"] and _terms_from_json(data["default"], vectors),
            canary=canary
            and Canary(_terms_from_json(canary["terms"], vectors), canary["fraction"]),
            admin=data["admin"] and Admin(**data["admin"]),
            layer_output=data["layer_output"],
        )

    def compiled(self) -> dict[str, Any]:
        """What a compiled graph depends on; everything else can change without compiling again."""
        return {
            "formula": FORMULA_VERSION,
            **asdict(self.limits),
            "layer_output": self.layer_output,
        }


def catalogue_of(vllm_config: Any) -> Catalogue | None:
    """The catalogue that an engine was started with, or None for an engine without grains."""
    additional = getattr(vllm_config, "additional_config", None)
    data = additional.get(KEY) if isinstance(additional, Mapping) else None
    return None if data is None else Catalogue.from_json(data)


def _terms_to_json(steering: Steering) -> list[dict[str, Any]]:
    return [
        {"name": term.entry.name, "strength": term.strength, "positions": term.positions}
        for term in steering.terms
    ]


def _terms_from_json(items: list[dict[str, Any]], vectors: Mapping[str, VectorEntry]) -> Steering:
    entries = [vectors[item["name"]] for item in items]
    return Steering.of(
        Term(entry, item["strength"], item["positions"], entry.layers)
        for entry, item in zip(entries, items, strict=True)
    )


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
