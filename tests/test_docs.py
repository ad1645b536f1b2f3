"""What the documents show, works as shown."""

import re
from pathlib import Path

import yaml

from grains_vllm.config import read_catalogue
from grains_vllm.vectors import SteeringVector
from tests.tiny import random_vector

ROOT = Path(__file__).parent.parent


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_example_artifact_is_a_valid_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/artifact.md", "python")
    exec(compile(code, "docs/artifact.md", "exec"), {})
    vector = SteeringVector.load("mine.safetensors")
    assert vector.recommended_layers == [12, 13, 14]
    assert vector.recommended_strength == 0.2


def test_the_readmes_catalogues_are_valid(tmp_path):
    catalogues = blocks("README.md", "yaml")
    assert catalogues
    for text in catalogues:
        for settings in yaml.safe_load(text)["vectors"].values():
            random_vector("llama", 0).save(tmp_path / settings["path"])
        (tmp_path / "steering.yaml").write_text(text)
        assert read_catalogue({"config": str(tmp_path / "steering.yaml")}).vectors


def test_the_tests_that_the_documents_name_exist():
    named = {
        test
        for page in (ROOT / "docs").glob("*.md")
        for test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())
    }
    assert named
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), (file, test)
