"""GGUF control vectors both ways."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.errors import InputError
from offline.gguf_vectors import llama_cpp_name, write_gguf
from offline.imports import read_vector

MODEL = ModelFingerprint("LlamaForCausalLM", 8, 4)


def vector(layers=(0, 1, 3), **passport):
    rows = torch.zeros(4, 8)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        row = torch.randn(8, generator=generator)
        rows[layer] = row / row.norm()
    return SteeringVector(rows, torch.tensor([2.0, 3.0, 4.0, 5.0]), MODEL, passport)


def read(path, model=MODEL, insists=False):
    """The vector, and what was said of it."""
    notes = []
    return read_vector(path, model, notes.append, insists), notes


def export(path, exported, hint="llama"):
    notes = []
    write_gguf(exported, path, hint, notes.append)
    return notes


def write(path, architecture="controlvector", hint="llama", count=None, more=(), **tensors):
    writer = gguf.GGUFWriter(str(path), architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    if count is not None:
        writer.add_uint32("controlvector.layer_count", count)
    for key, values in more:
        writer.add_array(key, values)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("_", "."), np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_without_a_recommendation_loses_layer_0_only(tmp_path):
    original = vector()
    left_out, unscaled, usage = export(tmp_path / "v.gguf", original)
    assert left_out == "layer 0 is left out: llama.cpp's control vectors start at layer 1"
    assert "recommends no strength" in unscaled
    assert usage == "layers 1,3; llama.cpp: --control-vector-scaled v.gguf:0.1"
    back, notes = read(tmp_path / "v.gguf")
    assert back.layers == [1, 3] and not notes
    for layer in (1, 3):
        torch.testing.assert_close(back.directions[layer], original.directions[layer])
    torch.testing.assert_close(back.reference_norms, torch.tensor([0.0, 3.0, 0.0, 5.0]))
    assert back.passport["model_hint"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_what_is_recommended_is_what_llama_cpp_does_at_its_scale_of_1(tmp_path):
    original = vector(recommended={"layers": [3], "strength": -0.5, "positions": "generation"})
    places, usage = export(tmp_path / "v.gguf", original)
    assert "positions 'generation' are not in the file: llama.cpp steers all tokens" in places
    assert usage == "layers 3; llama.cpp: --control-vector v.gguf"
    back, _ = read(tmp_path / "v.gguf")
    assert back.layers == [3]
    torch.testing.assert_close(back.directions[3], -original.directions[3])
    assert float(back.reference_norms[3]) == pytest.approx(2.5)


def test_file_is_what_llama_cpp_reads(tmp_path):
    export(tmp_path / "v.gguf", vector())
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
    back, _ = read(path)
    assert back.layers == [2] and float(back.reference_norms[2]) == pytest.approx(2**0.5)


@pytest.mark.parametrize("length", [1e-42, 1e-30, 1e7])
def test_lengths_at_the_edge_of_float32(tmp_path, length):
    row = np.array([length] + [0.0] * 7, dtype=np.float32)
    back, _ = read(write(tmp_path / "v.gguf", direction_2=row))
    assert back.directions[2].tolist() == [1.0] + [0.0] * 7
    assert float(back.reference_norms[2]) == float(row[0])


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        (vector((0,)), "layer 0 only"),
        (vector(recommended={"layers": [0]}), "layer 0 only"),
        (vector(recommended={"strength": 0.0}), "strength is 0, which steers nothing"),
    ],
)
def test_nothing_to_write(tmp_path, exported, message):
    with pytest.raises(InputError, match=message):
        export(tmp_path / "v.gguf", exported)
    assert not list(tmp_path.iterdir())


FULL = np.ones(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"architecture": "llama", "direction_1": FULL}, "general.architecture is 'llama'"),
        ({"other": FULL}, "tensor 'other', expected direction.N"),
        ({"direction_4": FULL}, "layer 4, but the model's layers are 0 to 3"),
        ({"direction_9999999": FULL}, "tensor 'direction.9999999', expected direction.N"),
        ({"direction_1": FULL, "direction_01": FULL}, "two tensors for layer 1"),
        ({"direction_1": FULL[:5]}, r"has the shape \[5\], the model's hidden size is 8"),
        ({"direction_1": FULL[:0]}, r"has the shape \[0\]"),
        ({"direction_1": FULL.reshape(2, 4)}, r"has the shape \[2, 4\]"),
        ({"direction_1": FULL * np.nan}, "holds a NaN"),
        ({"direction_1": FULL * 1e30}, "v.gguf: .*the reference norm of layer 1 is .*expected 0"),
        ({"direction_1": FULL * 0}, "no direction that is not zero"),
        ({"direction_1": np.ones(8, dtype=np.int32)}, "has type I32"),
        ({}, "no direction that is not zero"),
        (
            {"direction_2": FULL, "more": [("general.tags", ["x"] * 2000)]},
            "its metadata holds a long list",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "v.gguf", **tensors))


OTHERS = [
    ({"hint": "qwen2"}, "model_hint is 'qwen2', but the model is a LlamaForCausalLM"),
    ({"hint": "gemma2"}, "model_hint is 'gemma2', but the model is a LlamaForCausalLM"),
    ({"count": 31}, "layer_count is 31, but there are 1 tensors, and the model has 4 layers"),
    ({"direction_1": FULL}, "directions 1 to 2 are those of a model with 3 layers, but .* has 4"),
]


@pytest.mark.parametrize(("more", "message"), OTHERS, ids=[message for _, message in OTHERS])
def test_other_models_vectors_need_somebody_who_insists(tmp_path, more, message):
    path = write(tmp_path / "v.gguf", **{"direction_2": FULL, **more})
    with pytest.raises(InputError, match=rf"v.gguf: .*{message}.*; give --architecture"):
        read(path)
    found, (note,) = read(path, insists=True)
    assert 2 in found.layers and note.startswith("v.gguf: ")


@pytest.mark.parametrize("hint", ["llama", "mistral", "MISTRAL", None])
@pytest.mark.parametrize("count", [None, 1, 3, 4])
def test_what_fits_is_not_doubted(tmp_path, hint, count):
    assert not read(write(tmp_path / "v.gguf", hint=hint, count=count, direction_2=FULL))[1]


def test_what_is_not_known_is_said(tmp_path):
    _, (note,) = read(write(tmp_path / "v.gguf", hint="mine", direction_2=FULL))
    assert note == "v.gguf: its model_hint is 'mine', which was not compared with the model"
    other = ModelFingerprint("LlavaForConditionalGeneration", 8, 4)
    assert len(read(write(tmp_path / "w.gguf", direction_2=FULL), other)[1]) == 1


def test_our_own_files_say_exactly_whose_they_are(tmp_path):
    export(tmp_path / "v.gguf", vector(recommended={"layers": [1]}), "whatever")
    assert read(tmp_path / "v.gguf")[0].layers == [1]
    for other in (("Qwen2ForCausalLM", 8, 4), ("LlamaForCausalLM", 8, 9)):
        with pytest.raises(InputError, match=r"made for a model with .*, but this model has"):
            read(tmp_path / "v.gguf", ModelFingerprint(*other), insists=True)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("LlamaForCausalLM", "llama"), ("MixtralForCausalLM", "llama"), ("phi3", "phi3"),
        ("GPT2LMHeadModel", "gpt2"), ("Gemma3ForConditionalGeneration", "gemma3"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2vl"), ("command-r", "commandr"),
        ("CohereForCausalLM", "commandr"), ("GptOssForCausalLM", "gptoss"),
        ("StableLmForCausalLM", "stablelm"), ("LlavaForConditionalGeneration", None), (None, None),
    ],
)  # fmt: skip
def test_names_of_architectures(name, known):
    assert llama_cpp_name(name) == known


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "v.gguf"
    tags = [("general.tags", ["a", "b"]), ("x.numbers", [1, 2, 3])]
    return write(path, count=3, more=tags, direction_2=FULL, direction_3=FULL).read_bytes()


def refused_or_read(folder, payload):
    path = folder / "v.gguf"
    path.write_bytes(payload)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read(path)
        except InputError as error:
            assert str(error).startswith("v.gguf: ")


def test_no_beginning_of_a_file_is_read(tmp_path, good):
    for length in range(0, len(good), 7):
        refused_or_read(tmp_path, good[:length])


WORDS = [0, 9, 2**31, 2**63, 2**64 - 1]


def test_no_number_in_a_file_is_believed(tmp_path, good):
    """Counts, lengths, types, dimensions and offsets, each replaced by absurd ones."""
    for place in range(4, len(good) - 2 * FULL.nbytes, 4):
        for word in WORDS:
            for size in (4, 8):
                changed = (word % 2 ** (8 * size)).to_bytes(size, "little")
                refused_or_read(tmp_path, good[:place] + changed + good[place + size :])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flipped_bytes(tmp_path_factory, good, data):
    payload = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    refused_or_read(tmp_path_factory.getbasetemp(), bytes(payload))


def test_a_file_is_as_large_as_its_model(tmp_path, good):
    path = tmp_path / "v.gguf"
    path.write_bytes(good + bytes(2**20 + 4 * 8 * 8))
    with pytest.raises(InputError, match="larger than 1048832 bytes, more than 4 layers of 8 take"):
        read(path)
