"""What is served: the committed tiny model, eight random vectors, and a guest now and then."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from grains_vllm.vectors import ModelFingerprint, SteeringVector, write_aside

MODEL = Path(__file__).resolve().parent.parent / "sycophancy" / "model"
SERVED = "tiny"
MOST_VECTORS = 3
# About ||h|| in this model: a strength of 1 turns a token's state by roughly 45 degrees.
REFERENCE_NORM = 10.0
GUEST = "guest"


@dataclass(frozen=True)
class Vector:
    """One vector as the catalogue lists it; `layers` and below are what its entry says.

    Attributes:
        directions: [layers, hidden] float32, unit rows.
    """

    name: str
    digest: str
    directions: torch.Tensor
    layers: tuple[int, ...]
    strength: float
    positions: str

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "path": f"{self.digest[:12]}.safetensors",
            "layers": list(self.layers),
            "strength": self.strength,
            "positions": self.positions,
        }


class World:
    """The vectors, their files, and the YAML that names them.

    Attributes:
        vectors: the eight that are always there.
        guests: two vectors that take turns under the name GUEST.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self.folder, self.slots = folder, slots
        self.artifacts = folder / "vectors"
        self.artifacts.mkdir(parents=True)
        model = ModelFingerprint.of(AutoConfig.from_pretrained(MODEL))
        made = [_vector(number, model, self.artifacts) for number in range(10)]
        self.vectors: Mapping[str, Vector] = {vector.name: vector for vector in made[:8]}
        self.guests = made[8:]
        self.config = folder / "steering.yaml"
        self.write()

    def write(self, guest: Vector | None = None) -> None:
        """Writes the YAML, with a guest or without."""
        listed = [*self.vectors.values(), *([guest] if guest else [])]
        content = {
            "vectors": {
                v.name: {**v.settings, "path": f"vectors/{v.settings['path']}"} for v in listed
            },
            "steered_layers": "all",
            "slots": self.slots,
            "max_vectors_per_request": MOST_VECTORS,
            "admin": {"folder": "vectors"},
        }
        write_aside(self.config, yaml.safe_dump(content).encode())

    def by_digest(self, digest: str) -> Vector:
        """The vector of a receipt's shortened digest."""
        for vector in (*self.vectors.values(), *self.guests):
            if digest and vector.digest.startswith(digest):
                return vector
        raise KeyError(digest)


def _vector(number: int, model: ModelFingerprint, folder: Path) -> Vector:
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(model.num_layers, model.hidden_size, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    norms = torch.full((model.num_layers,), REFERENCE_NORM)
    artifact = SteeringVector(rows, norms, model)
    vector = Vector(
        name=f"v{number}" if number < 8 else GUEST,
        digest=artifact.digest,
        directions=rows,
        layers=((0, 1, 2, 3), (1,), (2, 3), (0, 2))[number % 4],
        strength=0.2 + 0.05 * number,
        positions=("all", "all", "prompt", "generation", "prompt:4+generation:6")[number % 5],
    )
    artifact.save(folder / vector.settings["path"])
    return vector
