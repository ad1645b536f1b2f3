"""Servers that the tests of this folder share."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests.server.serving import MODEL, Server, serve


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
    with serve(MODEL, catalogue, "--enable-prompt-tokens-details") as running:
        yield running
