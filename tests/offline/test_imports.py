"""Tensors by layer, as other tools keep them."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from grains_vllm.vectors import ModelFingerprint
from offline.errors import InputError
from offline.imports import OWN_LENGTHS, read_vector
from tests.offline.test_gguf_vectors import MODEL, vector

ROW = torch.tensor([3.0, 4.0] + [0.0] * 6)


def read(path, model=MODEL):
    return read_vector(path, model, pytest.fail)


@pytest.mark.parametrize(
    "name", ["{}", "layer.{}", "direction_{}", "model.layers.{}.mlp", "blocks.{}.hook_resid_post"]
)
def test_the_number_in_a_name_is_the_layer(tmp_path, name):
    tensors = {name.format(0): ROW, name.format(3): -2 * ROW}
    save_file(tensors, tmp_path / "v.safetensors")
    np.savez(tmp_path / "v.npz", **{key: row.numpy() for key, row in tensors.items()})
    np.savez_compressed(tmp_path / "w.npz", **{key: row.numpy() for key, row in tensors.items()})
    for file in ("v.safetensors", "v.npz", "w.npz"):
        found = read(tmp_path / file)
        assert found.layers == [0, 3]
        assert found.reference_norms.tolist() == [5.0, 0.0, 0.0, 10.0]
        torch.testing.assert_close(found.directions[3], -ROW / 5)
        assert found.passport["strength_unit"] == OWN_LENGTHS
        assert found.passport["data"]["name"] == file
        found.save(tmp_path / "artifact.safetensors")
    with pytest.raises(InputError, match="is an artifact already"):
        read(tmp_path / "artifact.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
def test_types_and_shapes(tmp_path, dtype, shape):
    save_file({"1": ROW.reshape(shape).to(dtype)}, tmp_path / "v.safetensors")
    assert float(read(tmp_path / "v.safetensors").reference_norms[1]) == 5


BAD = [
    ({"layer": ROW}, "'layer': expected one number in its name, the layer, counted from 0"),
    ({"gpt2.h.1": ROW}, "'gpt2.h.1': expected one number"),
    ({"1" * 4400: ROW}, "expected one number"),
    ({"mlp.1": ROW, "attn.2": -ROW}, "expected names that differ in their numbers only"),
    ({"1": ROW, "01": -ROW}, "two tensors for layer 1"),
    ({"4": ROW}, r"layers are 0 to 3 \(hidden_states\[N\] of transformers is after block N - 1\)"),
    ({"1": ROW[:7]}, r"shape \[7\], the model's hidden size is 8"),
    ({"1": ROW.reshape(2, 4)}, r"shape \[2, 4\]"),
    ({"1": ROW.int()}, "type int32, expected float16, float32, float64"),
    ({"1": ROW / 0}, "a NaN or infinity"),
    ({"1": ROW * 0}, "no direction that is not zero"),
    ({}, "holds no tensor"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD, ids=[message for _, message in BAD])
def test_what_could_mean_several_things_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "v.safetensors")
    np.savez(tmp_path / "v.npz", **{key: row.numpy() for key, row in tensors.items()})
    for file in ("v.safetensors", "v.npz"):
        with pytest.raises(InputError, match=f"{file}: .*{message}"):
            read(tmp_path / file)


def test_a_pickle_is_refused_with_the_way_in(tmp_path, monkeypatch, capsys):
    """And the way is one: what the message says is run."""
    tensors = {1: ROW.half(), 3: -ROW}
    torch.save(tensors, tmp_path / "mine.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "mine.pkl").write_bytes(pickle.dumps({1: [1.0]}))
    (tmp_path / "mine.bin").write_bytes(b"anything")
    (tmp_path / "large.pt").write_bytes(bytes(2**21))
    for file in ("mine.pkl", "mine.bin", "large.pt", "old.pt", "mine.pt"):
        with pytest.raises(InputError, match=f"{file}: a pickle can run code") as error:
            read(tmp_path / file)
    snippet = "\n".join(
        line[4:] for line in str(error.value).splitlines() if line.startswith("    ")
    )
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert read(tmp_path / "mine.safetensors").layers == [1, 3]


def _zip(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(name, content)
    return file.getvalue()


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _huge():
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**60,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


DAMAGED = {
    "half a zip": _zip("1.npy", _npy(ROW.numpy()))[:-9],
    "a member that is no array": _zip("1.npy", b"?"),
    "objects": _zip("1.npy", _npy(np.array([{}], dtype=object))),
    "a huge shape": _zip("1.npy", _huge()),
    "a bomb": _zip("1.npy", bytes(2**24)),
    "half a safetensors": save({"1": ROW})[:-1],
    "a long header": (2**60).to_bytes(8, "little") + b"{",
    "no JSON": (9).to_bytes(8, "little") + b"{" * 9,
    "text": b"1: [1, 2, 3]\n",
    "nothing": b"",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    (tmp_path / "v").write_bytes(DAMAGED[case])
    with pytest.raises(InputError, match=r"^v: "):
        read(tmp_path / "v")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_no_byte_of_a_file_is_believed(tmp_path, kind):
    path = tmp_path / f"v.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **{"1": ROW.numpy()})
    else:
        save_file({"1": ROW}, path)
    good = path.read_bytes()
    for place in range(len(good)):
        for byte in (0, 255, good[place] ^ 1):
            path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
            try:
                read_vector(path, MODEL, lambda note: None)
            except InputError as error:
                assert str(error).startswith(path.name)


def test_the_fingerprint_is_the_models(tmp_path):
    save_file({"1": ROW}, tmp_path / "v.safetensors")
    model = ModelFingerprint("AnyForCausalLM", 8, 2)
    assert read(tmp_path / "v.safetensors", model).model == model
    assert vector().model != model
