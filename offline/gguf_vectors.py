"""GGUF control vectors, as llama.cpp and repeng write them, both ways.

Their tensor `direction.N` is added to the residual stream after block N, counted from 0; its
length is the strength. llama.cpp numbers directions from 1 on, so block 0 can have none; and it
does not restore the norm of the stream, so equal strengths do not steer exactly alike.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.errors import InputError
from offline.sweep_table import layer_text

_ARCHITECTURE = "controlvector"
_HINT, _COUNT = f"{_ARCHITECTURE}.model_hint", f"{_ARCHITECTURE}.layer_count"
# What we add: whose vector it is, by the fields of a ModelFingerprint.
_WHOSE = {key: f"grains.{key}" for key in ("architecture", "hidden_size", "num_layers")}
_NAME = re.compile("direction\\.([0-9]{1,6})")
_LONGEST_LIST = 1024
_CLASS = re.compile("(ForCausalLM|ForConditionalGeneration|LMHeadModel)$")
# Where transformers and llama.cpp have different names.
_OTHERWISE = {
    "cohere": "commandr",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "granitemoehybrid": "granitehybrid",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "qwen25vl": "qwen2vl",
}
_KNOWN = {re.sub("[^a-z0-9]", "", name) for name in gguf.MODEL_ARCH_NAMES.values()}
_INSIST = "give --architecture, --hidden-size and --num-layers instead of --model if it fits anyway"


class _Reader(gguf.GGUFReader):
    """Reads no long lists: each element of one costs a hundred times its size."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind = self._get(orig_offs, np.uint32)[0]
            count = self._get(orig_offs + 4, np.uint64)[0]
            if count > _LONGEST_LIST or kind == gguf.GGUFValueType.ARRAY:
                raise ValueError("its metadata holds a long list, or lists in a list")
        return super()._get_field_parts(orig_offs, raw_type)


def read_gguf(
    payload: bytes,
    name: str,
    model: ModelFingerprint,
    note: Callable[[str], None],
    insists: bool = False,
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """The tensors by layer, and what the file says of its model.

    Args:
        note: told what speaks against `model`, or cannot be known.
        insists: `model` is right even where the file seems to be for another one.

    Raises:
        InputError: not a control vector, or one of another model.
    """
    try:
        # The library maps its file into memory; nobody else can change this one.
        with tempfile.NamedTemporaryFile(suffix=".gguf") as copy, np.errstate(over="ignore"):
            copy.write(payload)
            copy.flush()
            reader = _Reader(copy.name)
            fields = {key: field.contents() for key, field in reader.fields.items()}
            tensors = _tensors(reader.tensors, name)
    except InputError:
        raise
    except Exception as error:  # the library checks little, so that any kind may come up
        raise InputError(f"{name}: not a readable GGUF file ({error})") from error
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise InputError(
            f"{name}: general.architecture is {architecture!r}, expected '{_ARCHITECTURE}'"
        )
    hint = fields.get(_HINT)
    if not isinstance(hint, str | None):
        raise InputError(f"{name}: {_HINT} is {hint!r}, expected a text")
    if not _says_whose(fields, name, model):
        for against in (_hint_against(hint, model), _layers_against(fields, tensors, model)):
            if against is not None and not insists:
                raise InputError(f"{name}: {against}; {_INSIST}")
            if against is not None:
                note(f"{name}: {against}")
        if hint is not None and None in (llama_cpp_name(hint), llama_cpp_name(model.architecture)):
            note(f"{name}: its model_hint is {hint!r}, which was not compared with the model")
    return tensors, {"model_hint": hint}


def llama_cpp_name(name: Any) -> str | None:
    """What llama.cpp calls an architecture, without its marks; None where it is not known.

    Args:
        name: a class of transformers, a `model_type`, or llama.cpp's name.
    """
    stem = re.sub("[^a-z0-9]", "", _CLASS.sub("", str(name)).lower())
    found = _OTHERWISE.get(stem, stem)
    return found if found in _KNOWN else None


def _tensors(found: Any, name: str) -> dict[int, np.ndarray]:
    tensors: dict[int, np.ndarray] = {}
    for tensor in found:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise InputError(f"{name}: tensor {tensor.name[:60]!r}, expected direction.N only")
        layer = int(match[1])
        if layer in tensors:
            raise InputError(f"{name}: two tensors for layer {layer}")
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise InputError(
                f"{name}: tensor '{tensor.name}' has type {tensor.tensor_type.name}, "
                "expected F32 or F16"
            )
        tensors[layer] = np.array(tensor.data, dtype=np.float32)
    return tensors


def _says_whose(fields: Mapping[str, Any], name: str, model: ModelFingerprint) -> bool:
    """Whether the file says exactly whose vector it is, which must then be `model`'s."""
    if not all(field in fields for field in _WHOSE.values()):
        return False
    for key, field in _WHOSE.items():
        if fields[field] != getattr(model, key):
            raise InputError(
                f"{name}: made for a model with {key} {fields[field]!r}, but this model has "
                f"{key} {getattr(model, key)!r}"
            )
    return True


def _hint_against(hint: Any, model: ModelFingerprint) -> str | None:
    theirs, ours = llama_cpp_name(hint), llama_cpp_name(model.architecture)
    if None in (theirs, ours) or theirs == ours:
        return None
    return f"{_HINT} is {hint!r}, but the model is a {model.architecture}"


def _layers_against(
    fields: Mapping[str, Any], tensors: Mapping[int, Any], model: ModelFingerprint
) -> str | None:
    """llama.cpp and repeng write a direction for every layer but the first."""
    count, layers = fields.get(_COUNT, len(tensors)), sorted(tensors)
    if count not in (len(tensors), model.num_layers, model.num_layers - 1):
        return (
            f"{_COUNT} is {count!r}, but there are {len(tensors)} tensors, and the model has "
            f"{model.num_layers} layers"
        )
    if 1 < len(layers) < model.num_layers - 1 and layers == list(range(1, len(layers) + 1)):
        return (
            f"its directions 1 to {len(layers)} are those of a model with {len(layers) + 1} "
            f"layers, but this one has {model.num_layers}"
        )
    return None


def write_gguf(
    vector: SteeringVector, path: Path, model_hint: str, note: Callable[[str], None]
) -> None:
    """Writes what the vector recommends: its layers, each as long as its strength makes it.

    So llama.cpp steers as recommended at its own scale of 1. Without a recommended strength that
    is a strength of 1, without recommended layers all of them.

    Args:
        model_hint: llama.cpp's name of the architecture, such as "llama" or "qwen2".
        note: told what the format cannot hold, and how to reach other strengths.

    Raises:
        InputError: nothing is left to write.
    """
    layers = [layer for layer in vector.recommended_layers if layer > 0]
    if 0 in vector.recommended_layers:
        note("layer 0 is left out: llama.cpp's control vectors start at layer 1")
    if not layers:
        raise InputError("the vector has a direction in layer 0 only, which GGUF cannot hold")
    strength = vector.recommended_strength
    if strength == 0:
        raise InputError("the recommended strength is 0, which steers nothing")
    if vector.recommended_positions != "all":
        note(
            f"the positions '{vector.recommended_positions}' are not in the file: llama.cpp "
            "steers all tokens"
        )
    usage = f"--control-vector {path.name}"
    if strength is None:
        usage = f"--control-vector-scaled {path.name}:0.1"
        note("the vector recommends no strength: the file's scale of 1 is as long as the stream")
    note(f"layers {layer_text(layers)}; llama.cpp: {usage}")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(os.fspath(aside), _ARCHITECTURE)
        writer.add_string(_HINT, model_hint)
        writer.add_uint32(_COUNT, len(layers))
        writer.add_string(_WHOSE["architecture"], vector.model.architecture)
        writer.add_uint32(_WHOSE["hidden_size"], vector.model.hidden_size)
        writer.add_uint32(_WHOSE["num_layers"], vector.model.num_layers)
        for layer in layers:
            length = vector.reference_norms[layer] * (1.0 if strength is None else strength)
            writer.add_tensor(f"direction.{layer}", (vector.directions[layer] * length).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
