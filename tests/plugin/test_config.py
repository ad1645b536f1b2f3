"""steering.yaml: what it means, and that nothing in it is ignored or guessed."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig

from grains_vllm import plugin
from grains_vllm.catalogue import Catalogue, Limits, Term, catalogue_of
from grains_vllm.config import read_catalogue
from grains_vllm.errors import GrainsConfigError
from tests.tiny import random_vector

ONE = {"path": "one.safetensors", "strength": 0.5}


def test_reads_an_entry(catalogue, folder):
    entry = catalogue({"v": {**ONE, "layers": [2, 0], "description": "x"}}).vectors["v"]
    assert entry.path == str((folder / "one.safetensors").resolve())
    assert (entry.strength, entry.layers, entry.positions) == (0.5, (0, 2), "all")
    assert entry.digest == random_vector("llama", 0).digest


def test_paths_are_relative_to_the_yaml_not_to_the_working_directory(
    catalogue, tmp_path_factory, monkeypatch
):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert catalogue().vectors


def test_defaults_come_from_the_artifacts_recommendation(catalogue, folder):
    vector = random_vector("llama", 0)
    recommended = {"layers": [3, 1], "strength": 0.7, "positions": "prompt"}
    passport = {"recommended": recommended}
    dataclasses.replace(vector, passport=passport).save(folder / "one.safetensors")
    entry = catalogue({"v": {"path": "one.safetensors"}}).vectors["v"]
    assert (entry.layers, entry.strength, entry.positions) == ((1, 3), 0.7, "prompt")


def test_canonical_form_survives_json_and_ignores_order(catalogue):
    first = catalogue({"a": ONE, "b": {**ONE, "layers": [1]}}, default="b=2")
    second = catalogue({"b": {"layers": 1, **ONE}, "a": ONE}, default="b=2")
    assert first.to_json() == second.to_json()
    back = Catalogue.from_json(json.loads(json.dumps(first.to_json())))
    assert back.vectors == dict(first.vectors) and back.default == first.default
    assert back.to_json() == first.to_json()


def test_everything_survives_json(catalogue, folder):
    (folder / "more").mkdir()
    whole = catalogue(
        slots=7,
        max_vectors_per_request=3,
        steered_layers="all",
        default="truthful=0.1,polite",
        canary={"name": "polite", "fraction": 0.5},
        admin={"folder": "more", "max_vectors": 9, "max_bytes": 1000},
        layer_output="sum",
    )
    back = Catalogue.from_json(json.loads(json.dumps(whole.to_json())))
    assert back == whole
    assert whole.admin.folder == str((folder / "more").resolve())
    assert whole.limits == Limits((0, 1, 2, 3), 7, 3)


def test_only_what_is_compiled_in_makes_vllm_compile_again(catalogue):
    def key(**changed):
        config = VllmConfig()
        config.additional_config = {
            "other": changed.pop("other", 1),
            "grains": catalogue({"a": {**ONE, **changed.pop("one", {})}}, **changed).to_json(),
        }
        return config.compute_hash()

    plugin.enable()
    plain = VllmConfig().compute_hash()
    keys = {key(one={"layers": [1]}), key(slots=9), key(max_vectors_per_request=1), key(other=2)}
    assert len(keys | {plain, key()}) == 6
    assert key() == key(one={"strength": 3, "description": "x", "positions": "prompt:2"})
    plugin.unregister()


def test_slots_are_as_many_as_distinct_vectors(catalogue, folder):
    one, two = ONE, {**ONE, "path": "two.safetensors"}
    assert catalogue({"a": one, "b": {**one, "strength": 9}, "c": two}).limits.slots == 2
    three = {"a": one, "b": {**one, "layers": [1]}, "c": two}
    assert catalogue(three).limits.slots == 3
    assert catalogue(three, admin={"folder": "."}).limits.slots == 7
    assert catalogue(three, admin={"folder": ".", "max_vectors": 4}).limits.slots == 4
    assert catalogue(three, admin={"folder": "."}, slots=2).limits.slots == 2


def test_slot_and_digest_follow_what_decides_the_outcome(catalogue):
    entries = catalogue(
        {
            "base": ONE,
            "stronger": {**ONE, "strength": 2},
            "fewer": {**ONE, "layers": [1]},
            "absolute": {**ONE, "scale": "absolute"},
            "other": {"path": "two.safetensors", "strength": 0.5},
        }
    ).vectors
    keys = {
        name: Term(entry, entry.strength, entry.positions, entry.layers).slot_key
        for name, entry in entries.items()
    }
    assert keys["base"] == keys["stronger"]
    assert len(set(keys.values())) == 4


def test_an_engine_without_grains_has_no_catalogue():
    assert catalogue_of(SimpleNamespace(additional_config={"somebody": "else"})) is None


@pytest.mark.parametrize(
    ("vectors", "top", "message"),
    [
        ({}, {}, "vectors must map at least one name"),
        ([ONE], {}, "vectors must map at least one name"),
        ({"v": ONE}, {"defualt": "v"}, "unknown key 'defualt' (did you mean 'default'?)"),
        ({"v": {**ONE, "strenght": 1}}, {}, "vectors.v: unknown key 'strenght' (did you mean"),
        ({"v": {"strength": 1}}, {}, "vectors.v.path: None is not a file name"),
        ({"v": "one.safetensors"}, {}, "vectors.v: expected a mapping with the key 'path'"),
        ({"v": {**ONE, "path": "no"}}, {}, "no: no such file"),
        ({"v": {"path": "one.safetensors"}}, {}, "vectors.v.strength: missing, and the artifact"),
        ({"v": {**ONE, "strength": "much"}}, {}, "vectors.v.strength: 'much' is not a number"),
        ({"v": {**ONE, "strength": True}}, {}, "vectors.v.strength: True is not a number"),
        ({"v": {**ONE, "strength": float("nan")}}, {}, "vectors.v.strength: nan is not a number"),
        ({"v": {**ONE, "layers": [4]}}, {}, "vectors.v.layers: [4] have no direction"),
        ({"v": {**ONE, "layers": []}}, {}, "vectors.v.layers: [] is not a layer number"),
        ({"v": {**ONE, "layers": "1-2"}}, {}, "vectors.v.layers: '1-2' is not a layer number"),
        (
            {"v": {**ONE, "positions": "answer"}},
            {},
            "'answer' is not one of all, text, image, prompt, prompt:N",
        ),
        ({"v": {**ONE, "scale": "big"}}, {}, "'big' is not one of relative, absolute"),
        ({"v": {**ONE, "description": 3}}, {}, "vectors.v.description: 3 is not text"),
        ({"v": {**ONE, "strength": 10**400}}, {}, "v.strength: a huge integer is not a number"),
        ({"none": ONE}, {}, "'none' cannot name a vector"),
        ({"a=b": ONE}, {}, "'a=b' cannot name a vector"),
        ({"..": ONE}, {}, "'..' cannot name a vector"),
        ({"e\u0301": ONE}, {}, "cannot name a vector (text of 1 to 128 printable characters in"),
        ({"v": ONE}, {"default": "w"}, "default: steering: unknown vector 'w'"),
        ({"v": ONE}, {"layer_output": "both"}, "layer_output: 'both' is not one of sum, single"),
        ({"v": ONE}, {"slots": 0}, "slots: 0 is not a whole number from 1"),
        ({"v": ONE}, {"slots": 1}, "slots is 1, but one request may combine 2 vectors"),
        ({"v": ONE}, {"max_vectors_per_request": 9}, "9 is not a whole number from 1 to 8"),
        ({"v": ONE}, {"steered_layers": [0, 1]}, "steered_layers leaves out [2, 3]"),
        ({"v": ONE}, {"steered_layers": [0, 1, 2, 3, 4]}, "[4] are no layers of a model with 4"),
        ({"v": ONE}, {"steered_layers": "some"}, "steered_layers: 'some' is not a layer number"),
        ({"v": ONE}, {"canary": "v"}, "canary: expected a mapping"),
        ({"v": ONE}, {"canary": {"name": "w", "fraction": 0.1}}, "unknown vector 'w'"),
        ({"v": ONE}, {"canary": {"name": "v", "fraction": 1.1}}, "1.1 is not a number from 0 to"),
        ({"v": ONE}, {"canary": {"fraction": 0.1}}, "canary.name: names no vector"),
        ({"v": ONE}, {"admin": {"folder": "nowhere"}}, "nowhere is not a folder"),
        ({"v": ONE}, {"admin": {"folder": ".", "max_vector": 1}}, "unknown key 'max_vector'"),
        ({"v": ONE, "w": ONE}, {"admin": {"folder": ".", "max_vectors": 1}}, "but there are 2"),
    ],
)
def test_refuses(catalogue, vectors, top, message):
    with pytest.raises(GrainsConfigError) as error:
        catalogue(vectors, **top)
    assert message in str(error.value)
    assert "steering.yaml" in str(error.value)


def test_refuses_layers_where_no_strength_would_steer(catalogue, folder):
    norms = torch.tensor([10.0, 0, 10, 0])
    dataclasses.replace(random_vector("llama", 0), reference_norms=norms).save(
        folder / "one.safetensors"
    )
    with pytest.raises(GrainsConfigError, match=r"reference norm is 0 at \[1, 3\]"):
        catalogue({"v": ONE})
    assert catalogue({"v": {**ONE, "layers": [0, 2]}, "w": {**ONE, "scale": "absolute"}})


def test_yaml_merge_keys_may_be_overridden(folder):
    path = folder / "steering.yaml"
    path.write_text(
        "vectors:\n  a: &base {path: one.safetensors, strength: 1}\n  b: {<<: *base, strength: 2}\n"
    )
    assert read_catalogue({"config": str(path)}).vectors["b"].strength == 2


def test_refuses_vectors_of_different_models(catalogue, folder):
    random_vector("gpt2", 0).save(folder / "two.safetensors")
    with pytest.raises(GrainsConfigError, match="different models"):
        catalogue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vectors: {v: {path: a}, v: {path: b}}", "the key 'v' stands here twice"),
        ("vectors: [", "not valid YAML"),
        ("just text", "expected a mapping"),
        ("vectors: {v: !!python/object/apply:os.system [x]}", "not valid YAML"),
    ],
)
def test_refuses_bad_yaml(tmp_path, text, message):
    path = tmp_path / "steering.yaml"
    path.write_text(text)
    with pytest.raises(GrainsConfigError, match=message):
        read_catalogue({"config": str(path)})


def test_refuses_a_missing_file_and_a_mixed_form(tmp_path):
    with pytest.raises(GrainsConfigError, match="cannot be read"):
        read_catalogue({"config": str(tmp_path / "no.yaml")})
    with pytest.raises(GrainsConfigError, match=r"\['vectors'\] belong into that file"):
        read_catalogue({"config": "x.yaml", "vectors": {}})
