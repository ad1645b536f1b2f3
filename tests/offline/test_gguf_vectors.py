"""GGUF control vectors both ways."""

import gguf
import numpy as np
import pytest
import torch

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.errors import InputError
from offline.gguf_vectors import read_gguf, write_gguf

MODEL = ModelFingerprint("LlamaForCausalLM", 8, 4)


def vector(layers=(0, 1, 3)):
    rows = torch.zeros(4, 8)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        row = torch.randn(8, generator=generator)
        rows[layer] = row / row.norm()
    return SteeringVector(rows, torch.tensor([2.0, 3.0, 4.0, 5.0]), MODEL)


def write(path, architecture="controlvector", **tensors):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, values in tensors.items():
        writer.add_tensor(name.replace("_", "."), np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_loses_layer_0_only(tmp_path):
    notes, original = [], vector()
    write_gguf(original, tmp_path / "v.gguf", "llama", notes.append)
    assert notes == ["layer 0 is left out: llama.cpp's control vectors start at layer 1"]
    back = read_gguf(tmp_path / "v.gguf", MODEL)
    assert back.layers == [1, 3]
    for layer in (1, 3):
        torch.testing.assert_close(back.directions[layer], original.directions[layer])
    torch.testing.assert_close(back.reference_norms, torch.tensor([0.0, 3.0, 0.0, 5.0]))
    assert back.passport["model_hint"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_file_is_what_llama_cpp_reads(tmp_path):
    write_gguf(vector(), tmp_path / "v.gguf", "llama", lambda note: None)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    types = reader.get_field("controlvector.layer_count").types
    assert types == [gguf.GGUFValueType.UINT32]
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    expected = (vector().directions[3] * 5).numpy()
    np.testing.assert_allclose(reader.tensors[1].data, expected, rtol=1e-6)
    assert reader.tensors[0].tensor_type == gguf.GGMLQuantizationType.F32


def test_half_precision_tensors_are_read(tmp_path):
    path = write(tmp_path / "v.gguf", direction_2=np.full(8, 0.5, dtype=np.float16))
    back = read_gguf(path, MODEL)
    assert back.layers == [2] and float(back.reference_norms[2]) == pytest.approx(2**0.5)


def test_only_layer_0_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="layer 0 only"):
        write_gguf(vector((0,)), tmp_path / "v.gguf", "llama", lambda note: None)
    assert not list(tmp_path.iterdir())


FULL = np.ones(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("architecture", "tensors", "message"),
    [
        ("llama", {"direction_1": FULL}, "general.architecture is 'llama'"),
        ("controlvector", {"other": FULL}, "tensor 'other', expected direction.N"),
        (
            "controlvector",
            {"direction_4": FULL},
            "'direction.4', but the model's layers are 0 to 3",
        ),
        ("controlvector", {"direction_1": FULL[:5]}, "has 5 values, the model's hidden size is 8"),
        ("controlvector", {"direction_1": FULL * np.nan}, "holds a NaN"),
        ("controlvector", {"direction_1": FULL * 0}, "no direction that is not zero"),
        ("controlvector", {"direction_1": np.ones(8, dtype=np.int32)}, "has type I32"),
    ],
)
def test_bad_files_are_refused(tmp_path, architecture, tensors, message):
    path = write(tmp_path / "v.gguf", architecture, **tensors)
    with pytest.raises(InputError, match=message):
        read_gguf(path, MODEL)


def test_not_gguf_at_all(tmp_path):
    path = tmp_path / "v.gguf"
    for content in (b"", b"no", b"GGUF" + b"\0" * 40):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"v.gguf: not a readable GGUF file"):
            read_gguf(path, MODEL)
