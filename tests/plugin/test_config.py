"""steering.yaml: what it means, and that nothing in it is ignored or guessed."""

import dataclasses
import json
import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig

from grains_vllm import plain_yaml, plugin
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
        ({"v": {"strength": 1}}, {}, "vectors.v.path: None is not the name of a file"),
        ({"v": {**ONE, "path": "a\0b"}}, {}, "vectors.v.path: 'a\\x00b' holds a NUL"),
        ({"v": {**ONE, "path": "\ud800"}}, {}, "vectors.v.path: '\\ud800' holds a NUL or half"),
        ({"v": {**ONE, "path": "a" * 999}}, {}, "cannot be read"),
        ({"v": {**ONE, "path": "loop"}}, {}, "cannot be read"),
        ({"v": {**ONE, "path": "pipe"}}, {}, "pipe: cannot be read (it is not a plain file)"),
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
        (
            {"v": {**ONE, "description": "\udfff"}},
            {},
            "vectors.v.description: '\\udfff' holds a NUL",
        ),
        ({"v": {**ONE, "layers": [10**70]}}, {}, "have no direction in the artifact"),
        ({"v": {**ONE, "positions": [1, 2]}}, {}, "vectors.v.positions: [1, 2] is not one of all"),
        ({"v": {**ONE, "strength": 10**99}}, {}, "v.strength: a huge integer is not a number"),
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
        ({"v": ONE}, {"admin": {"folder": "nowhere"}}, "nowhere' is not a folder"),
        ({"v": ONE}, {"admin": {"folder": "loop"}}, "admin.folder: "),
        ({"v": ONE}, {"admin": {"folder": "a\0b"}}, "admin.folder: 'a\\x00b' holds a NUL"),
        ({"v": ONE}, {"admin": {"folder": "\ud800"}}, "admin.folder: '\\ud800' holds a NUL or"),
        ({"v": ONE}, {"admin": {"folder": "a" * 9999}}, "is not a folder"),
        ({"v": ONE}, {"admin": {"folder": ["x"] * 999}}, "is not the name of a folder"),
        ({"v": ONE}, {"admin": {"folder": ".", "max_vector": 1}}, "unknown key 'max_vector'"),
        ({"v": ONE, "w": ONE}, {"admin": {"folder": ".", "max_vectors": 1}}, "but there are 2"),
    ],
)
def test_refuses(catalogue, folder, vectors, top, message):
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
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
        ("vectors: {v: {path: a}, v: {path: b}}", "column 25: the key 'v' stands here twice"),
        ("vectors: [", "not valid YAML (line 1, column 11: "),
        ("just text", "expected a mapping"),
        ("vectors: {v: !!python/object/apply:os.system [x]}", "'python/object/apply:os.system'"),
        # What PyYAML makes of scalars, or fails to.
        ("vectors: {v: {path: 2020-13-45}}", "'2020-13-45' is a 'timestamp', expected one of str"),
        ("vectors: {v: {path: 2020-12-24}}", "'2020-12-24' is a 'timestamp', expected one of str"),
        ("vectors: {v: {strength: 0x_}}", "line 1, column 25: '0x_' cannot be read as int"),
        ("vectors: {v: {strength: !!int abc}}", "'abc' cannot be read as int"),
        ("vectors: {v: {strength: !!int ''}}", "'' cannot be read as int"),
        ("vectors: {v: {strength: !!float x}}", "'x' cannot be read as float"),
        ("vectors: {v: {strength: !!bool foo}}", "'foo' cannot be read as bool"),
        ("vectors: {v: !!map foo}", "expected a mapping"),
        ("vectors: {v: !!seq foo}", "expected a sequence"),
        ("vectors: {v: !!str [a]}", "expected a scalar"),
        ("vectors: {v: !!int [1]}", "expected a scalar"),
        ("vectors: {v: !!set {a, b}}", "'set', expected one of"),
        ("vectors: {v: !!omap [a: 1]}", "'omap', expected one of"),
        ("vectors: {v: !!binary aGk=}", "'binary', expected one of"),
        ("vectors: {v: {strength: " + "9" * 5000 + "}}", "is too long for a number"),
        ("vectors: {v: {strength: 0x" + "f" * 5000 + "}}", "is too long for a number"),
        ("vectors: {v: {strength: 1:" + "1:" * 400 + "1.5}}", "is too long for a number"),
        ("vectors: {? [a] : b}", "a list or a mapping cannot be a key"),
        ("vectors: {? {a: b} : c}", "a list or a mapping cannot be a key"),
        ("vectors: &a [*a]", "found unconstructable recursive node"),
        ("vectors: &a {b: *a}", "found unconstructable recursive node"),
        ("vectors: {<<: 3}", "expected a mapping or list of mappings for merging"),
        ("vectors: {<<: [3]}", "expected a mapping for merging"),
        ("vectors: " + "[" * 5000, "nested too deeply"),
        ("vectors: " + "[" * 50 + "]" * 50, "vectors must map at least one name"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("vectors: {.nan: 1, .inf: 2}", "nan cannot name a vector"),
        ("vectors: {v: {1: 2}}", "unknown key 1"),
        ("vectors: \0", "not valid YAML"),
        ("vectors: *nobody", "found undefined alias"),
        ("vectors: *" + "x" * 3000, "found undefined alias"),
        ('vectors: "\\U00110000"', "not valid YAML"),
        ('vectors: "\\UFFFFFFFF"', "not valid YAML"),
        ("%YAML 1." + "1" * 5000 + "\n--- {}", "not valid YAML"),
    ],
)  # fmt: skip
def test_refuses_bad_yaml(tmp_path, text, message):
    path = tmp_path / "steering.yaml"
    path.write_text(text)
    with pytest.raises(GrainsConfigError) as error:
        read_catalogue({"config": str(path)})
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(9 * [f'*{before}'])}]\n"
    for before, name in pairwise("abcdefghi")
)  # fmt: skip
# Nine to the power of four: more than a message can hold, less than aliases may stand for.
SQUIB = BOMB[: BOMB.index("e:")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "vectors: {v: {path: *i}}", "aliases stand for more than 100000 values"),
        (SQUIB + "vectors: {v: {path: *d}}", "unknown key 'a'"),
        ("vectors: {v: {path: [" + SQUIB.replace("\n", ",")[:-1] + "]}}", "v.path: [{'a': ["),
        ("vectors: {v: &a {path: x}" + "".join(f", v{n}: *a" for n in range(40_000)) + "}",
         "aliases stand for more than"),
    ],
)  # fmt: skip
def test_aliases_cannot_multiply(tmp_path, text, message):
    path = tmp_path / "steering.yaml"
    path.write_text(text)
    with pytest.raises(GrainsConfigError) as error:
        read_catalogue({"config": str(path)})
    assert message in str(error.value)
    assert len(str(error.value)) < 500


def test_a_file_is_no_list_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_yaml, "MAX_VALUES", 1000)
    path = tmp_path / "steering.yaml"
    path.write_text("vectors: [" + "1," * 1001 + "]")
    with pytest.raises(GrainsConfigError, match="it holds more than 1000 values"):
        read_catalogue({"config": str(path)})


def test_refuses_other_kinds_of_files(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("no.yaml", "loop", "pipe", ".", "a" * 999):
        with pytest.raises(GrainsConfigError, match=r"--grains-config .* cannot be read"):
            read_catalogue({"config": str(tmp_path / name)})
    for name in (None, 3, ["a"], "a\0b", "\ud800"):
        with pytest.raises(GrainsConfigError, match="--grains-config: "):
            read_catalogue({"config": name})


def test_refuses_values_that_no_file_could_hold(folder):
    """Given inline, as Python objects."""
    vectors = {"v": {**ONE, "path": str(folder / "one.safetensors")}}
    for layers in (10**5000, [10**5000], {1}, [[1]]):
        with pytest.raises(GrainsConfigError, match="steered_layers: "):
            read_catalogue({"vectors": vectors, "steered_layers": layers})


def test_refuses_a_mixed_form():
    with pytest.raises(GrainsConfigError, match=r"\['vectors'\] belong into that file"):
        read_catalogue({"config": "x.yaml", "vectors": {}})
