"""The artifact: what is written is what is read, and everything else is refused by name."""

import json
import os
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from grains_vllm.vectors import (
    LAYER_CONVENTION,
    ArtifactError,
    ModelFingerprint,
    SteeringVector,
    read_whole,
    write_aside,
)

MODEL = ModelFingerprint("LlamaForCausalLM", 4, 3)


def vector(**changes):
    directions = torch.eye(3, 4)
    return SteeringVector(
        **{
            "directions": directions,
            "reference_norms": torch.tensor([1.0, 2.0, 3.0]),
            "model": MODEL,
            "passport": {"method": "test", "recommended": {"layers": [1], "strength": 0.3}},
            **changes,
        }
    )


def write(path, tensors=None, passport=None, drop=()):
    passport = {
        "format_version": 1,
        "layer_convention": LAYER_CONVENTION,
        "model": {"architecture": "LlamaForCausalLM", "hidden_size": 4, "num_layers": 3},
        **(passport or {}),
    }
    tensors = {"directions": torch.eye(3, 4), "reference_norms": torch.ones(3), **(tensors or {})}
    for key in drop:
        passport.pop(key, None)
        tensors.pop(key, None)
    safetensors.torch.save_file(tensors, path, metadata={"grains": json.dumps(passport)})
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "v.safetensors"
    vector().save(path)
    loaded = SteeringVector.load(path, MODEL)
    assert torch.equal(loaded.directions, vector().directions)
    assert torch.equal(loaded.reference_norms, vector().reference_norms)
    assert loaded.passport["method"] == "test"
    assert (loaded.recommended_layers, loaded.recommended_strength) == ([1], 0.3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # Readable by a server of another user.


def test_positions_of_every_kind_can_be_recommended(tmp_path):
    for positions in ("all", "generation:8", "prompt:1+generation"):
        path = write(tmp_path / "v", passport={"recommended": {"positions": positions}})
        assert SteeringVector.load(path).recommended_positions == positions


def test_digest_covers_what_steers_and_nothing_else(tmp_path):
    path = write(tmp_path / "v.safetensors", passport={"note": "other prose"})
    plain = vector(reference_norms=torch.ones(3)).digest
    assert SteeringVector.load(path).digest == plain
    assert vector().digest != plain
    assert vector(directions=torch.eye(3, 4).flip(0)).digest != vector().digest
    other = ModelFingerprint("Qwen2ForCausalLM", 4, 3)
    assert vector(model=other).digest != vector().digest


def test_digest_is_stable_across_releases():
    """A changed digest would silently empty prefix caches; change it only with the format."""
    assert vector().digest.startswith("9a400142e6cef87ae3538bcf4a262e1e")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"directions": torch.eye(3, 4).half()}}, "directions has dtype torch.float16"),
        ({"tensors": {"directions": torch.eye(2, 4)}}, r"directions has shape \(2, 4\), expected"),
        ({"tensors": {"reference_norms": torch.ones(4)}}, r"reference_norms has shape \(4,\)"),
        ({"tensors": {"directions": torch.eye(3, 4) * torch.nan}}, "directions holds a NaN"),
        ({"tensors": {"reference_norms": torch.ones(3) / 0}}, "reference_norms holds a NaN or inf"),
        ({"tensors": {"reference_norms": -torch.ones(3)}}, "reference norm of layer 0 is -1"),
        ({"tensors": {"reference_norms": 1e9 * torch.ones(3)}}, r"layer 0 is 1e\+09, expected"),
        ({"tensors": {"directions": 2 * torch.eye(3, 4)}}, "direction of layer 0 has norm 2"),
        ({"tensors": {"directions": torch.zeros(3, 4)}}, "every direction is zero"),
        ({"tensors": {"extra": torch.ones(1)}}, r"holds the tensors .*'extra'"),
        ({"drop": ["reference_norms"]}, r"holds the tensors \['directions'\]"),
        ({"passport": {"format_version": 2}}, "format_version is 2, this release reads 1"),
        ({"passport": {"layer_convention": "before block l"}}, "layer_convention is 'before"),
        ({"drop": ["model"]}, "metadata model is None"),
        ({"passport": {"model": {"architecture": "X", "hidden_size": "4", "num_layers": 3}}},
         "model.hidden_size is '4', expected int"),
        ({"passport": {"recommended": {"layers": [7]}}}, r"recommended.layers is \[7\]"),
        ({"passport": {"recommended": {"layers": "all"}}}, "recommended.layers is 'all'"),
        ({"passport": {"recommended": {"layers": [1, 1]}}}, r"\[1, 1\]: one stands twice"),
        ({"passport": {"recommended": {"layers": [10**99]}}}, r"layers is \[a huge integer\]"),
        ({"passport": {"recommended": {"strength": "strong"}}},
         "recommended.strength: 'strong' is not a number"),
        ({"passport": {"recommended": {"strength": 10**400}}},
         "recommended.strength: a huge integer is not a number between"),
        ({"passport": {"recommended": {"positions": ["x"] * 10**5}}}, r"\.\.\. is not one of all"),
        ({"passport": {"recommended": {"positions": "end"}}},
         "recommended.positions: 'end' is not one of all, text, image, prompt, prompt:N"),
        ({"passport": {"recommended": {"positions": 1}}}, "recommended.positions: 1 is not one of"),
        ({"passport": {"recommended": 3}}, "recommended is 3"),
        ({"passport": {"model_id": ["a"]}}, r"model_id: \['a'\] is not text"),
        ({"passport": {"model_id": "a\0b"}}, "model_id: .* holds a NUL"),
        ({"passport": {"model_id": "\ud800"}}, "'model_id' holds half a character"),
        ({"passport": {"method": {"\ud800": 1}}}, "'method' holds half a character"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, change, message):
    path = write(tmp_path / "v.safetensors", **change)
    with pytest.raises(ArtifactError, match=message) as error:
        SteeringVector.load(path)
    assert str(path) in str(error.value)


def header(text, body=b""):
    """A safetensors file with this header, whatever it says."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def entry(start=0, **changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8], **changes}


TWICE = json.dumps(entry()).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"seven b",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (10**6).to_bytes(8, "little") + b"{}",
        header({"a": entry(), "b": entry(4)}, bytes(12)),
        header({"a": entry(), "b": entry(12)}, bytes(20)),
        header({"a": entry()}, bytes(9)),
        header({"a": entry(shape=[2**40, 2**40])}, bytes(8)),
        header({"a": entry(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3])}, bytes(3)),
        header(b'{"a":%b,"a":%b}' % (TWICE, TWICE), bytes(8)),
        header(b'{"__metadata__":{"grains":"{}","grains":"{}"},"a":%b}' % TWICE, bytes(8)),
        header(b"[" * 10**5),
    ],
)
def test_refuses_what_is_no_safetensors_file(tmp_path, content):
    path = tmp_path / "v.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read as a safetensors file"):
        SteeringVector.load(path)


def test_refuses_a_passport_that_says_something_twice(tmp_path):
    path = write(tmp_path / "v", passport={"note": "format_version"})
    path.write_bytes(
        path.read_bytes().replace(b'note\\": \\"format_version', b'format_version\\": \\"note')
    )
    with pytest.raises(ArtifactError, match="a key stands twice"):
        SteeringVector.load(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "v")
    stat_of = os.fstat

    def fstat(handle):
        found = stat_of(handle)
        os.truncate(path, found.st_size // 2)
        return found

    monkeypatch.setattr("os.fstat", fstat)
    with pytest.raises(ArtifactError, match="cannot be read as a safetensors file"):
        SteeringVector.load(path)


def test_a_file_that_shrinks_afterwards_changes_nothing(tmp_path):
    """In a process of its own: with a mapped file it would die of SIGBUS."""
    code = """
import os, sys
from grains_vllm.vectors import SteeringVector
vector = SteeringVector.load(sys.argv[1])
before = vector.digest
os.truncate(sys.argv[1], 0)
assert vector.digest == before
"""
    path = write(tmp_path / "v")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refuses_what_is_no_plain_file_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "pipe": "not a plain file",
        "": "not a plain file",
        "loop": "cannot be read",
        "a\0b": "cannot be read",
        "\ud800": "cannot be read",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            SteeringVector.load(tmp_path / name)
    with pytest.raises(OSError, match="it has 5 bytes, 4 are allowed"):
        (tmp_path / "five").write_bytes(b"12345")
        read_whole(tmp_path / "five", 4)


def test_refuses_foreign_and_missing_files(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"directions": torch.eye(3)}, foreign)
    with pytest.raises(ArtifactError, match="not a grains artifact"):
        SteeringVector.load(foreign)
    with pytest.raises(ArtifactError, match="no such file"):
        SteeringVector.load(tmp_path / "missing")
    pickled = tmp_path / "pickle.safetensors"
    torch.save({"directions": torch.eye(3)}, pickled)
    with pytest.raises(ArtifactError, match="cannot be read as a safetensors"):
        SteeringVector.load(pickled)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelFingerprint("Qwen2ForCausalLM", 4, 3), "'LlamaForCausalLM'.*'Qwen2ForCausalLM'"),
        (ModelFingerprint("LlamaForCausalLM", 8, 3), "hidden_size 4, but this model .* 8"),
        (ModelFingerprint("LlamaForCausalLM", 4, 2), "num_layers 3, but this model .* 2"),
    ],
)
def test_refuses_another_model_naming_both(tmp_path, model, message):
    path = write(tmp_path / "v.safetensors")
    with pytest.raises(ArtifactError, match=message):
        SteeringVector.load(path, model)


def test_layers_without_a_direction_are_zero_rows(tmp_path):
    directions = torch.eye(3, 4)
    directions[0] = 0
    assert vector(directions=directions).layers == [1, 2]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_aside(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["v"]
