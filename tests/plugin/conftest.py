from pathlib import Path

import pytest
import yaml

from grains_vllm.catalogue import Catalogue
from grains_vllm.config import read_catalogue
from tests.tiny import random_vector


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        random_vector("llama", seed).save(tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def catalogue(folder: Path):
    """Builds a catalogue from YAML content given as Python objects, through a real file."""

    def build(vectors: object = None, **top: object) -> Catalogue:
        if vectors is None:
            vectors = {
                "truthful": {"path": "one.safetensors", "strength": 0.5},
                "polite": {"path": "two.safetensors", "strength": 0.2, "positions": "prompt"},
            }
        path = folder / "steering.yaml"
        path.write_text(yaml.safe_dump({"vectors": vectors, **top}))
        return read_catalogue({"config": str(path)})

    return build
