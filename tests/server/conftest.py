"""Servers that the tests of this folder share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks import hallucination
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests.server.serving import MODEL, Server, serve

# A LLaVA that this repository has trained.
VISION_MODEL = Path(hallucination.__file__).parent / "model"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The trained tiny model with two random vectors, `truthful` and `polite`."""
    folder = tmp_path_factory.mktemp("server")
    config = AutoConfig.from_pretrained(MODEL)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    lines = ["vectors:"]
    for seed, name in enumerate(("truthful", "polite")):
        directions = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(seed))
        SteeringVector(
            directions / directions.norm(dim=1, keepdim=True),
            torch.full((layers,), 5.0),
            ModelFingerprint.of(config),
        ).save(folder / f"{name}.safetensors")
        lines.append(f"  {name}: {{path: {name}.safetensors, strength: 0.5}}")
    catalogue = folder / "steering.yaml"
    catalogue.write_text("\n".join(lines) + "\n")
    flags = ("--enable-prompt-tokens-details", "--enable-scale-out")
    with serve(MODEL, catalogue, *flags) as running:
        yield running


@dataclass
class VisionServer(Server):
    """A server of the image model in the folder `model`, with one vector under several names.

    `faithful` steers text; `all`, `generation` and `image` are called like their positions.
    """

    model: Path
    directions: torch.Tensor
    norm: float = 10.0
    strength: float = 0.5


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionServer]:
    folder = tmp_path_factory.mktemp("vision-server")
    path = VISION_MODEL
    fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(path))
    shape = fingerprint.num_layers, fingerprint.hidden_size
    directions = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    norms = torch.full((shape[0],), VisionServer.norm)
    SteeringVector(directions, norms, fingerprint).save(folder / "v.safetensors")
    names = {"faithful": "text", "all": "all", "generation": "generation", "image": "image"}
    lines = ["vectors:"] + [
        f"  {name}: {{path: v.safetensors, strength: {VisionServer.strength}, "
        f"positions: {positions}}}"
        for name, positions in names.items()
    ]
    catalogue = folder / "steering.yaml"
    catalogue.write_text("\n".join(lines) + "\n")
    with serve(path, catalogue) as running:
        yield VisionServer(running.url, running.client, running.log, path, directions)
